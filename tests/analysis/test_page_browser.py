"""The page in a real browser: what one can do with it, in which sizes and colours, and how fast it is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from test_page import HOSTILE, make_prompt, make_results

from browser import until, violations
from phatgoose.analysis.page import RoutedPrompt, report, routed_prompt
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.trace.record import trace_answer
from phatgoose.routers import Gander
from phatgoose.workflows.page import read_results

pytest_plugins = ["browser_fixtures"]
LAYERS, KINDS = 30, 7
PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results"


def with_everything(names=("walk", "plural"), layers=3):
    results = make_results(*names[:2])
    results["experts"] += [{"name": name, "task": f"task of {name}"} for name in names[2:]]
    for i, expert in enumerate(results["experts"]):
        expert |= {
            "kind": "LoRA",
            "base_model": "tiny",
            "modules": 14,
            "made": {"seed": 3, "finished": "2026-01-01T00:00:00Z"},
            "health": [
                {"level": "good", "text": "14 gates, none constant"},
                {"level": "look", "text": "2 gates lie along the mean"},
            ],
            "nearest": [{"name": results["experts"][i - 1]["name"], "similarity": 0.5}],
        }
    share = 1 / len(names)
    results["layers"] = {
        task["name"]: {
            "layers": [str(i) for i in range(layers)],
            "experts": list(names),
            "shares": [
                [share * (1.5 if (e + i + n) % 2 else 0.5) for e in range(len(names))] for i in range(layers)
            ],
        }
        for n, task in enumerate(results["tasks"])
    }
    return results


@pytest.fixture
def small(tmp_path):
    return report(with_everything(), [make_prompt(), make_prompt("run")], out=tmp_path / "page.html")


def token(page, text):
    return page.locator("article").first.locator(".token", has_text=text).first


def test_a_layer_can_be_picked_and_a_token_asked(small, visit):
    page = visit(small)
    first = page.locator("article").first
    first.scroll_into_view_if_needed()
    assert token(page, "walk").get_attribute("aria-label") == "walk B: plural 60 %"
    token(page, "walk").hover()
    assert "2 modules" in first.locator(".detail").text_content()
    page.locator("#layer").select_option(label="1")
    token(page, "walk").hover()
    detail = first.locator(".detail").text_content()
    assert "one module" in detail
    assert "plural" in detail
    page.locator("#kind").select_option(label="self_attn.q_proj")  # which layer 1 doesn't have here
    assert "not seen" in token(page, "walk").get_attribute("aria-label")


def test_tokens_by_keyboard(small, visit):
    page = visit(small)
    page.locator("article").first.scroll_into_view_if_needed()
    token(page, "a").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent").startswith("walk")
    assert "“walk” token 2 of 3" in page.locator("article").first.locator(".detail").text_content()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.t") == "2"
    assert page.locator("article").first.locator(".token[tabindex='0']").count() == 1


def test_an_expert_can_be_picked_out_in_the_legend(small, visit):
    page = visit(small)
    page.locator("article").first.scroll_into_view_if_needed()
    page.locator("#legend button", has_text="plural").click()
    assert "dim" not in token(page, "walk").get_attribute("class")
    assert "dim" in token(page, "a").get_attribute("class")
    page.locator("#legend button", has_text="plural").click()
    assert page.locator(".token.dim").count() == 0
    page.locator("#legend button").first.focus()
    page.keyboard.press("ArrowRight")
    assert "plural" in page.evaluate("document.activeElement.textContent")


def test_the_search_filters_cards_layers_and_legend(small, visit):
    page = visit(small)
    page.get_by_label("Find experts").fill("PLUR")
    until(page, "document.getElementById('found').textContent === '1 of 2 experts'")
    assert page.locator(".card:visible").count() == 1
    assert page.locator("#layers-table tbody tr").count() == 1
    assert page.locator("#legend button:visible").count() == 1
    page.get_by_label("Find experts").fill("a")  # its letter, or in a name or task
    until(page, "document.getElementById('found').textContent === '2 of 2 experts'")
    page.get_by_label("Find experts").fill("nobody")
    until(page, "document.getElementById('found').textContent === '0 of 2 experts'")
    assert "No expert fits" in page.locator("#layers-cell").text_content()


def test_the_layers_of_a_task_by_keyboard(small, visit):
    page = visit(small)
    rows = page.locator("#layers-table tbody tr")
    assert rows.count() == 2
    page.locator("#layers-order").select_option(label="as in the pool")
    assert [rows.nth(0).locator("td").nth(i).text_content() for i in range(3)] == ["25", "75", "25"]
    page.locator("#layers-task").select_option(label="held")
    assert [rows.nth(0).locator("td").nth(i).text_content() for i in range(3)] == ["75", "25", "75"]
    rows.nth(0).locator("td").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator("#layers-cell").text_content() == "B plural, layer 1: 75 %, number 1 of 2 there"


def test_cards_link_to_their_nearest(small, visit):
    page = visit(small)
    card = page.locator(".card").first
    card.scroll_into_view_if_needed()
    assert "look at this:  2 gates lie along the mean" in card.text_content()
    card.get_by_role("link", name="plural").click()
    assert page.evaluate("location.hash") == "#expert-2"


def test_the_data_can_be_downloaded(small, visit):
    page = visit(small)
    with page.expect_download() as started:
        page.get_by_role("link", name="Download the data").click()
    data = json.loads(started.value.path().read_text())
    assert data["results"] == with_everything()
    assert data["prompts"][0]["tokens"] == ["a", "walk", "\n"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_fits_and_is_accessible(small, visit, width, dark):
    page = visit(small, width=width, dark=dark)
    for article in page.locator("article").all():
        article.scroll_into_view_if_needed()
    until(page, "document.querySelectorAll('.plain').length === 0")
    page.locator("#legend button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []


def test_without_scripts_the_prompts_and_tables_are_there(small, visit):
    page = visit(small, script=False)
    assert page.locator(".plain").first.text_content() == "walk"
    assert page.locator(".card").count() == 2
    assert page.locator("#filters").is_hidden()


def test_hostile_names_run_nothing(tmp_path, visit):
    results = with_everything((HOSTILE, HOSTILE + "b"))
    for expert in results["experts"]:
        expert["made"] = {HOSTILE: HOSTILE}
        expert["health"] = [{"level": "look", "text": HOSTILE}]
    page = visit(
        report(results, [make_prompt(HOSTILE, (HOSTILE, HOSTILE + "b"))], out=tmp_path / "hostile.html")
    )
    page.locator("article").scroll_into_view_if_needed()
    page.locator(".token").nth(1).hover()
    page.locator("#layers-table td").first.hover()
    page.get_by_label("Find experts").fill("script")
    page.wait_for_timeout(200)
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    assert HOSTILE.replace("\u2028", "") in page.locator(".card h4").first.text_content().replace(
        "\u2028", ""
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """166 experts × 210 modules × 2,000 tokens."""
    draws = random.Random(0)
    names = [f"expert_{i}" for i in range(166)]
    results = with_everything(names, layers=LAYERS)
    some = []
    for _ in range(KINDS):
        cells = []
        for _ in range(2000):
            a, b = draws.sample(range(166), 2)
            w = draws.uniform(0.5, 1)
            cells.append(((a, w), (b, 1 - w)))
        some.append(tuple(cells))
    kinds = [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    prompt = RoutedPrompt(
        "past_tense", "long " * 2000, "x", "y", True, tuple(f"word{i} " for i in range(2000)), 1900, tuple(names),
        tuple(f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in kinds),
        tuple(some[(m * 5) % KINDS] for m in range(LAYERS * KINDS)),
    )  # fmt: skip
    return report(results, [prompt], out=tmp_path_factory.mktemp("large") / "page.html")


def test_a_large_page_is_small_and_quick(large, visit):
    assert large.stat().st_size < 10e6
    paints, work = [], []
    for _ in range(3):
        page = visit(large)
        clock = page.context.new_cdp_session(page)
        clock.send("Performance.enable", {"timeDomain": "threadTicks"})
        until(page, "performance.getEntriesByName('first-contentful-paint').length", 60)
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        metrics = {m["name"]: m["value"] for m in clock.send("Performance.getMetrics")["metrics"]}
        work.append(1000 * metrics["TaskDuration"])
        if paints[-1] < 1000:
            break
    # On a busy machine the page waits for its turn; its own work must fit all the same.
    assert min(paints) < 1000 or min(work) < 1000, (paints, work)
    page.locator("article").first.scroll_into_view_if_needed()
    until(page, "document.querySelectorAll('.token').length === 2000")
    spent = page.evaluate(
        """() => { const t = performance.now(), s = document.getElementById("layer");
        s.value = "3"; s.dispatchEvent(new Event("change")); document.body.offsetHeight; """
        "return performance.now() - t; }"
    )
    assert spent < 1500
    assert page.locator("#layers-table tbody tr").count() == 25
    page.locator("#layers-rows").select_option(label="all")
    assert page.locator("#layers-table tbody tr").count() == 166


@pytest.mark.parametrize("name", ["quickstart-2026-11-22", "bigbench-t0-2026-11-24"])
def test_no_table_is_cut_on_a_usual_screen(tmp_path, visit, name):
    """The published results, whose pages lost columns at 1280 pixels; a phone scrolls tables, not the page."""
    page = visit(report(read_results(PUBLISHED / f"{name}.json"), out=tmp_path / "page.html"), width=1280)
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate("document.querySelectorAll('#results table.results').length") >= 2
    assert page.evaluate(cut) == 0
    phone = visit(tmp_path / "page.html", width=375)
    assert phone.evaluate("document.documentElement.scrollWidth") == 375


def test_what_the_base_does_under_gander_is_shown_as_no_expert(visit, make_base, make_expert, tmp_path):
    """Layers that are read, and a token that stands before the text."""
    base = make_base("llama")
    pool = Pool([make_expert(base, name, seed=i) for i, name in enumerate("ab")])
    route(base, pool, Gander())
    prompt = torch.tensor([[base.tokenizer.eos_token_id, *base.tokenizer("walk red")["input_ids"]]])
    recorded, _ = trace_answer(base, prompt, 3)
    unroute(base)
    shown = routed_prompt(recorded, base, task="", prompt="", expected="", answer="", correct=None)
    page = visit(report(None, [shown], out=tmp_path / "page.html"))
    page.locator(".token").first.click()
    detail = page.locator(".detail").first
    assert "no expert" in detail.inner_text()
    assert "100 %" in detail.inner_text()
    labels = page.evaluate(
        "[...document.querySelectorAll('.token')].map((t) => t.getAttribute('aria-label'))"
    )
    assert not [label for label in labels if "not seen" in label]
    page.locator("#layer").select_option("0")
    until(page, "[...document.querySelectorAll('.token i')].every((letter) => letter.textContent === '–')")
    page.locator("#layer").select_option("1")
    until(
        page,
        "[...document.querySelectorAll('.token i')].slice(1).every((letter) => letter.textContent !== '–')",
    )
