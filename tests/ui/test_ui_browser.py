"""The live page in a real browser: ask, watch, pick, switch off, compare, in all sizes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from ui_tools import PROMPT

from browser import until, violations
from phatgoose.experts.pool import Pool
from phatgoose.ui import session as session_module
from phatgoose.ui.session import Limits, Session

pytest_plugins = ["browser_fixtures", "ui_fixtures"]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}{% x %}\u2028]]>"
DONE = "!document.getElementById('answer').disabled"


@pytest.fixture
def opened(make_session, served, visit):
    """opened(**how) → the page of a fresh server, with a router of tokens."""

    def open(session=None, router="phatgoose", **how):
        page = visit(served(make_session() if session is None else session) + "/", **how)
        page.locator("#side-A .router").select_option(router)
        page.get_by_label("Most tokens").fill("6")
        return page

    return open


@pytest.fixture
def slowed(monkeypatch):
    """slowed(seconds) makes every token of an answer take so long."""
    told = session_module._send

    def slow(seconds):
        monkeypatch.setattr(session_module, "_send", lambda *a: (told(*a), time.sleep(seconds))[0])

    return slow


def begin(page, text=PROMPT):
    page.locator("#prompt").fill(text)
    page.get_by_role("button", name="Answer", exact=True).click()


def begin_slowly(opened, slowed, seconds, tokens, seen):
    """A page whose answer of so many tokens has begun: `seen` is there."""
    slowed(seconds)
    page = opened()
    page.get_by_label("Most tokens").fill(str(tokens))
    begin(page)
    until(page, f"document.querySelectorAll({seen!r}).length > 0", 30)
    return page


def answer(page, text=PROMPT):
    begin(page, text)
    until(page, DONE, 60)


def marks(page, side="A"):
    """What the tokens of one answer look like: texts with letters."""
    return page.locator(f"#tokens-{side} .token").all_text_contents()


def drawer(page, side="A"):
    """Opens the drawer of experts of one of the settings."""
    page.locator(f"#side-{side} .who-acts").click()
    return page.locator("#experts")


def switch(page, expert, side="A"):
    """Switches one expert, by its number, on or off."""
    drawer(page, side).locator(".switch input").nth(expert).click()
    page.keyboard.press("Escape")


def in_view(page, selector):
    """Whether all of an element is on the screen, of which nothing was scrolled."""
    return page.evaluate(
        """selector => { const box = document.querySelector(selector).getBoundingClientRect();
        return scrollY === 0 && box.height > 10 && box.top >= 0 && box.bottom <= innerHeight
          && box.left >= 0 && box.right <= innerWidth; }""",
        selector,
    )


def test_a_prompt_is_answered_token_by_token(opened, slowed):
    slowed(0.15)
    page = opened()
    page.locator("#prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelectorAll('.token').length > 0", 30)
    early = len(marks(page))
    assert page.get_by_role("button", name="Stop").is_enabled()
    until(page, DONE, 60)
    assert early < len(marks(page))
    assert "6 tokens in" in page.locator("#side-A .state").text_content()
    assert page.locator("#tokens-A .token.written").count() == 5
    assert page.locator("#side-A .said").text_content()
    assert page.locator("#side-A .told").text_content().startswith("Settings A answered: ")


def test_a_layer_is_picked_and_a_token_asked(opened):
    page = opened()
    answer(page)
    token = page.locator("#tokens-A .token").nth(2)
    token.hover()
    detail = page.locator("#tokens-A .detail")
    assert "14 modules" in detail.text_content()
    page.locator("#layer").select_option(label="1")
    page.locator("#kind").select_option(label="self_attn.q_proj")
    token.focus()
    assert "one module" in detail.text_content()
    page.keyboard.press("ArrowRight")
    assert "token 4 of" in detail.text_content()
    page.locator("#legend button", has_text="b").first.click()
    assert 0 < page.locator("#tokens-A .token.dim").count() < page.locator("#tokens-A .token").count()


def test_an_expert_is_switched_off_and_the_answer_changes(opened):
    page = opened()
    answer(page)
    before, table = marks(page), page.locator("#layers-table tbody tr", has_text="A a")
    said = page.locator("#side-A .said").text_content()
    assert any(text.endswith("A") for text in before)
    assert table.locator("td.mean").text_content() != "0.0 %"
    switch(page, 0)
    assert page.locator("#side-A .who-acts").text_content() == "2 of 3 experts on"
    assert "changed since" in page.locator("#side-A .state").text_content()
    answer(page)
    assert marks(page) != before
    assert page.locator("#side-A .said").text_content() != said
    assert not any(text.endswith("A") for text in marks(page))
    assert table.count() == 0
    page.locator("#layers-order").select_option(label="as in the pool")
    assert table.locator("td.mean").text_content() == "0.0 %"
    drawer(page).get_by_role("button", name="Switch all on").click()
    page.get_by_role("button", name="Close").click()
    answer(page)
    assert marks(page) == before


def test_two_settings_side_by_side(opened):
    page = opened()
    page.get_by_label("Compare two settings").check()
    answer(page)
    assert "part at token" in page.locator("#compared").text_content()
    assert page.locator(".cut", has_text="parts here").count() == 2
    assert page.locator("#tokens-B .token.unseen").count() == len(marks(page, "B"))
    page.locator("#side-B .router").select_option("phatgoose")
    assert page.locator("#side-B .top-k").input_value() == "2"
    answer(page)
    assert page.locator("#compared").text_content() == "Both settings give the same answer."
    assert marks(page) == marks(page, "B")
    page.locator("#side-B .top-k").fill("1")
    answer(page)
    assert marks(page) != marks(page, "B")
    page.locator("#layers-task").select_option(label="settings B")
    a = page.locator("#layers-table td").all_text_contents()
    page.locator("#layers-task").select_option(label="settings A")
    assert page.locator("#layers-table td").all_text_contents() != a
    page.locator("#side-B .router").select_option("random")
    switch(page, 0, "B")
    answer(page)
    assert "can't be switched off" in page.locator("#side-B .trouble").text_content()
    assert page.locator("#compared").is_hidden()


def test_who_stands_in_the_table_stays_there_while_it_is_drawn(opened, slowed):
    page = begin_slowly(opened, slowed, 0.2, 12, "#layers-table td[data-place]")
    page.locator("#layers-table td[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    place, said = "document.activeElement.dataset.place", page.locator("#layers-cell").text_content()
    table = page.evaluate_handle("document.querySelector('#layers-table table')")
    here = page.evaluate(place)
    assert here
    until(page, "document.querySelectorAll('.token.written').length > 6", 30)
    assert not table.evaluate("table => table.isConnected")  # it was drawn again
    assert page.evaluate(place) == here
    assert page.locator("#layers-cell").text_content() == said  # nobody is read the same again and again
    until(page, DONE, 60)
    assert page.evaluate(place) == here
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(place) not in (here, None)


def test_a_setting_that_fails_leaves_the_page_usable(opened, monkeypatch):
    page, answers, calls = opened(), session_module.greedy_answer, []

    def fails(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory")
        return answers(*args, **settings)

    monkeypatch.setattr(session_module, "greedy_answer", fails)
    page.get_by_label("Compare two settings").check()
    answer(page)
    assert page.locator("#side-B .trouble").text_content()
    assert page.locator("#compared").is_hidden()
    answer(page)
    assert page.locator("#compared").is_visible()


def test_stopping(opened, slowed):
    page = begin_slowly(opened, slowed, 0.1, 300, ".token.written")
    page.get_by_role("button", name="Stop").click()
    until(page, DONE)
    assert page.locator("#side-A .state").text_content() == "Stopped."
    page.get_by_label("Most tokens").fill("2")
    answer(page)
    assert "2 tokens in" in page.locator("#side-A .state").text_content()


def test_by_keyboard_alone(opened):
    page = opened()
    page.locator("#prompt").focus()
    page.keyboard.type("yes no")
    for _ in range(3):  # answer, (stop is off), most tokens, compare
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator("#compare").is_checked()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # in a field of the form
    until(page, DONE, 60)
    assert marks(page)
    page.locator("#side-A .who-acts").focus()
    page.keyboard.press("Enter")
    for _ in range(4):  # from close: find, all on, all off, the first expert
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")
    assert page.locator("#experts").is_hidden()
    assert page.evaluate("document.activeElement.textContent") == "2 of 3 experts on"


@pytest.mark.slow(4)
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_fits_and_is_accessible(opened, width, dark):
    page = opened(width=width, dark=dark)
    page.get_by_label("Compare two settings").check()
    page.locator("#side-B .router").select_option("gander")
    answer(page, PROMPT + " " + "long" * 60)
    page.locator("#tokens-A .token").nth(3).focus()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []
    drawer(page).locator("summary").nth(1).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []


@pytest.mark.parametrize(("height", "width"), [(800, 1280), (768, 1024), (667, 375)])
@pytest.mark.parametrize("router", ["phatgoose", "gander", "base"])
def test_the_answer_stands_where_one_looks(opened, slowed, width, height, router):
    slowed(0.05)
    page = opened(width=width, router=router)
    page.set_viewport_size({"width": width, "height": height})
    page.get_by_label("Most tokens").fill("24")
    begin(page)
    until(page, "document.querySelectorAll('#tokens-A .written').length > 2", 30)
    assert in_view(page, "#side-A .said")
    assert in_view(page, "#answer")
    assert not page.evaluate(DONE)  # it is still written
    until(page, DONE, 60)
    assert in_view(page, "#side-A .said")
    assert in_view(page, "#prompt")
    line = page.locator("#side-A .settings").inner_text()
    assert "tiny-llama" in line
    assert router in line


@pytest.mark.parametrize(("height", "width"), [(800, 1280), (667, 375)])
def test_a_long_answer_scrolls_in_its_frame_and_follows_what_is_written(opened, slowed, width, height):
    slowed(0.005)
    page = opened(width=width)
    page.set_viewport_size({"width": width, "height": height})
    page.get_by_label("Most tokens").fill("500" if width > 500 else "300")
    page.locator("#side-A .said").evaluate("said => { said.style.fontSize = '2.5rem'; }")
    begin(page, PROMPT)
    said = "document.querySelector('#side-A .said')"
    until(page, f"{said}.scrollTop > 40", 30)
    assert in_view(page, "#side-A .said")
    page.evaluate(f"{said}.scrollTop = 0")
    written = page.locator("#side-A .said").text_content()
    until(page, f"{said}.textContent.length > {len(written) + 20}", 30)
    assert page.evaluate(f"{said}.scrollTop") == 0  # its reader has scrolled back
    page.evaluate(f"{said}.scrollTop = {said}.scrollHeight")
    until(page, DONE, 90)
    assert page.evaluate(f"{said}.scrollHeight - {said}.scrollTop - {said}.clientHeight") < 8
    assert in_view(page, "#side-A .said")


@pytest.mark.parametrize("width", [1280, 375])
def test_a_drawer_of_500_experts(make_base, make_expert, opened, width):
    base = make_base("llama")
    one = make_expert(base, "expert", rank=1)
    names = [f"expert-{i}" for i in range(499)] + ["a-name-" + "that-goes-on-" * 7]
    page = opened(Session(base, Pool([replace(one, name=name) for name in names])), width=width)
    page.locator("#side-A .who-acts").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Find experts").fill("expert-49")
    until(page, "document.getElementById('found').textContent === '10 of 500 experts'")
    page.get_by_role("button", name="Switch these 10 off").click()
    assert page.locator("#acting").text_content() == "490 of 500 on"
    assert page.locator(".switch:visible").count() == 10
    page.get_by_label("Find experts").fill("goes")
    page.get_by_role("button", name="Switch these 1 off").wait_for()
    box = page.locator(".switch:visible").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    page.get_by_label("Find experts").fill("")
    page.get_by_role("button", name="Switch all off").click()
    assert page.locator("#acting").text_content() == "0 of 500 on"
    page.locator(".switch").nth(7).click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == "1 of 500 experts on"
    answer(page)
    assert page.locator("#legend button:visible").all_text_contents() == ["H expert-7"]


def test_gander_says_who_acts_and_on_what_evidence(opened):
    page = opened(router="gander")
    answer(page)
    said = page.locator("#side-A .evidence")
    first, second, _ = (
        part.split()[0] for part in said.locator(".bars li > :nth-child(2)").all_text_contents()
    )
    sums = [float(text) for text in said.locator(".bars li > :last-child").all_text_contents()]
    assert sums == sorted(sums, reverse=True)
    assert f"{first} is {sums[0] - sums[1]:.1f} ahead of {second}" in said.locator(".apart").text_content()
    assert said.locator(".apart q").count() == 6
    assert "writes" in said.locator(".lead").text_content()
    assert page.locator("#side-A .stack").count() == 0
    assert page.locator(
        "#by-token .token"
    ).first.is_hidden()  # one expert for all: nothing to pick out at first
    switch(page, "abc".index(first))
    answer(page)
    assert said.locator(".bars li > :nth-child(2)").first.text_content() == second
    assert said.locator(".bars li").count() == 2
    page.get_by_label("Compare two settings").check()
    answer(page)
    assert page.locator("#side-B .evidence").is_hidden()
    assert page.locator("#tokens-B .token").first.is_visible()


def test_text_from_right_to_left_stands_so(opened):
    page = opened()
    answer(page, "ما هو الفعل")
    first, second = (page.locator("#tokens-A .token").nth(t).bounding_box() for t in (0, 1))
    assert first["x"] > second["x"]
    page.locator("#tokens-A .token").nth(3).focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.t") == "4"


def test_what_goes_wrong_is_said_where_the_answer_would_be(make_session, served, visit, slowed):
    page = visit(served(make_session(limits=Limits(prompt_tokens=40))) + "/", width=375)
    page.set_viewport_size({"width": 375, "height": 667})
    begin(page, "word " * 60)
    trouble = page.locator("#side-A .trouble")
    until(page, DONE)
    assert "at most 40 are taken" in trouble.text_content()
    assert in_view(page, "#side-A .trouble")
    page.get_by_label("Most tokens").fill("0")
    begin(page)
    assert page.evaluate("document.activeElement.id") == "tokens"  # the browser says what is wrong with it
    assert page.evaluate(DONE)


def test_hostile_names_and_prompts_run_nothing(make_base, pool_of, opened):
    base = make_base("llama")
    experts = list(pool_of(base).experts)
    for i, expert in enumerate(
        experts
    ):  # names are checked when experts are read; the page doesn't rely on that
        expert.provenance.update({"task": {"name": HOSTILE}, "author": HOSTILE, "seed": HOSTILE})
        object.__setattr__(expert, "name", HOSTILE + str(i))
    base.spec = f"tiny-llama-{HOSTILE}"
    page = opened(Session(base, Pool(experts)))
    answer(page, HOSTILE)
    page.locator("#tokens-A .token").nth(3).hover()
    page.locator("#layers-table td").first.hover()
    drawer(page).locator(".switch").nth(0).click()
    page.locator("summary").last.click()
    page.get_by_label("Find experts").fill("script")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Close").click()
    answer(page, HOSTILE)
    page.wait_for_timeout(200)
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    plain = HOSTILE.replace("\u2028", "")
    assert plain in page.locator(".switch").first.text_content().replace("\u2028", "")
    assert plain in page.locator("#side-A .settings").text_content().replace("\u2028", "")
    read = "".join(page.locator("#tokens-A .token:not(.written) b").all_text_contents()).replace("\u2028", "")
    assert read.replace("·", "").startswith("</script><script>alert(1)</script><img src=x onerror=alert(2)>")


def test_the_policy_lets_nothing_else_run(make_session, served, chromium):
    context = chromium.new_context()
    page = context.new_page()
    page.goto(served(make_session()) + "/")
    # Later, since what a test evaluates itself is exempt from the policy.
    page.evaluate(
        """() => { window.tried = [];
        const trials = { code: () => window["ev" + "al"]("1"), maker: () => new Function("return 1")(),
          markup: () => { document.body.innerHTML = "<b></b>"; },
          elsewhere: () => { document.head.append(Object.assign(document.createElement("script"), """
        """{ src: "/x.js" })); } };
        setTimeout(() => { for (const [name, trial] of Object.entries(trials)) {
          try { trial(); window.tried.push(name + " ran"); } """
        "catch (error) { window.tried.push(error.name); } } }, 0); }"
    )
    until(page, "window.tried.length === 4")
    assert page.evaluate("window.tried") == ["EvalError", "EvalError", "TypeError", "TypeError"]
    context.close()
