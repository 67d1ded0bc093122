from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from types import MappingProxyType

import pytest

from phatgoose.analysis.page import FORMAT, RoutedPrompt, breakable, percent, points, report, seconds
from phatgoose.analysis.view import letters
from phatgoose.errors import EvaluationError, StorageError
from report_data import unpacked

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}{% x %}\u2028]]>"


def score(mean, half=0.05):
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def make_results(a="walk", b="plural", task="past_tense", other="held"):
    def system(name, kind, first, second):
        return {
            "name": name,
            "kind": kind,
            "note": "",
            "scores": {task: {**score(first), "rows": 100}, other: {**score(second), "rows": 98}},
            "groups": {"in-pool": score(first), "held-out": score(second)},
        }

    return {
        "title": "A test",
        "made": {"when": "2025-01-02T03:04:05", "phatgoose": "0.1.0", "seconds": 61.5},
        "base": {"spec": "tiny", "notes": ["dequantised"]},
        "recipe": {"expert": {"rank": 8, "learning_rate": 0.002}, "seed": 0},
        "experts": [
            {
                "name": name,
                "task": task if name == a else "elsewhere",
                "spec": "bigbench:x",
                "rows": 800,
                "rank": 8,
                "parameters": 1234567,
                "steps": 50,
                "gate_steps": 30,
                "expert_seconds": 75.0,
                "gate_seconds": 30.0,
                "gate_token_share": 0.4,
                "base": 0.125,
                "own": 0.875,
            }
            for name in (a, b)
        ],
        "tasks": [
            {
                "name": task,
                "spec": "bigbench:" + task,
                "group": "in-pool",
                "metric": "exact match",
                "rows": 100,
            },
            {"name": other, "spec": "bigbench:" + other, "group": "held-out", "metric": "rank", "rows": 98},
        ],
        "systems": [
            system("base", "base", 0.31, 0.23),
            system("single: " + a, "single", 0.5, 0.351),
            system("PHATGOOSE", "router", 0.58, 0.34),
            system("oracle", "oracle", 0.7, 0.4),
        ],
        "comparisons": [
            {"group": "in-pool", "a": "PHATGOOSE", "b": "base", "difference": 0.27, "low": 0.2, "high": 0.34},
            {
                "group": "held-out",
                "a": "PHATGOOSE",
                "b": "base",
                "difference": 0.11,
                "low": -0.01,
                "high": 0.2,
            },
            {
                "group": "held-out",
                "a": "PHATGOOSE",
                "b": "oracle",
                "difference": -0.06,
                "low": -0.1,
                "high": -0.02,
            },
        ],
        "recovered": {
            "in-pool": {"share": 0.69, "low": 0.5, "high": 0.83},
            "held-out": {"share": None, "low": None, "high": None},
        },
        "shares": {task: {a: 0.75, b: 0.25}, other: {a: 0.5, b: 0.5}},
        "notes": ["Made for a test."],
    }


def make_prompt(text="walk", experts=("walk", "plural")):
    cells = (((0, 0.75), (1, 0.25)), ((1, 0.6), (0, 0.4)), ((-1, 1.0),))
    return RoutedPrompt(
        task="past_tense",
        prompt=text,
        expected="walked",
        answer=text,
        correct=True,
        tokens=("a", text, "\n"),
        generated_from=2,
        experts=tuple(experts),
        modules=("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
        choices=(cells, cells),
    )


class Page(HTMLParser):
    """Tags with attributes, text outside scripts and styles, and the contents of scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.scripts, self._inside = [], [], [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    def count(self, tag):
        return sum(t == tag for t, _ in self.tags)


@pytest.fixture
def page(tmp_path):
    def make(results, prompts=()):
        out = report(results, prompts, out=tmp_path / "deep" / "page.html")
        html = out.read_text(encoding="utf-8")
        return html, Page(html)

    return make


def test_a_share_without_an_interval_is_not_shown(page):
    """Older results.json have such shares, beside a gain of the oracle that may be none."""
    results = make_results()
    results["recovered"] = {
        "held-out": {"share": 0.47, "low": None, "high": None},
        "in-pool": {"share": 0.69},
    }
    _, p = page(results)
    assert "47 %" not in p.text
    assert "69 %" not in p.text
    assert "too little over the base" in p.text


def test_the_page_says_what_the_results_say(page):
    _, p = page(make_results(), [make_prompt()])
    assert "PHATGOOSE, which is never told the task, recovered 69 % of what the best expert" in p.text
    assert "95 % interval 50 to 83 %" in p.text
    assert "base 31.0 %, PHATGOOSE 58.0 %, oracle 70.0 %" in p.text
    assert (
        "too little over the base" in p.text
    )  # no share on held-out tasks, though the oracle gains a little
    assert "A gate was trained on 40 % as many tokens as its expert" in p.text
    assert "+27.0" in p.text
    assert "PHATGOOSE is better" in p.text
    assert "PHATGOOSE is worse" in p.text
    assert "can’t be told apart" in p.text
    assert "+75.0" in p.text  # the expert's own gain
    assert "1,234,567" in p.text
    assert "expert.learning_rate" in p.text
    assert "1 min 15 s" in p.text
    ids = [a["id"] for _, a in p.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for t, a in p.tags if t == "a" and "href" in a}
    assert targets <= {"#" + i for i in ids}


def test_the_best_of_each_column_is_marked_by_a_word_and_never_the_oracle(page):
    html, _ = page(make_results())
    table = html[html.index('<table class="results">') : html.index("</table>")]
    best = {
        re.search(r"<th[^>]*>(.*?)(?:<small|</th)", row)[1].replace("<wbr>", ""): row.count("best: ")
        for row in table.split("<tr")[3:]
    }
    assert best == {"base": 0, "single: walk": 0, "PHATGOOSE": 2, "oracle": 0}  # a table for each group


def test_many_tasks_stand_in_several_tables(page):
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    tasks = [{"name": f"task {i}", "group": "bbh" if i < 19 else "other"} for i in range(20)]
    scores = {t["name"]: {**score, "mean": 0.40 + i / 100} for i, t in enumerate(tasks)}
    systems = [{"name": "base", "kind": "base", "scores": scores, "groups": {"bbh": score}}]
    html, p = page({"tasks": tasks, "systems": systems})
    tables = html.split('<table class="results">')[1:]
    heads = [re.findall(r'<th scope="col" title="([^"]*)"', t) for t in tables]
    assert [len(h) for h in heads] == [7, 7, 5, 1]
    assert [name for head in heads for name in head] == [t["name"] for t in tasks]
    assert "bbh: 8 to 14 of 19" in p.text
    assert html.count("mean of 19") == 3


def test_the_plot_places_dots_on_one_scale(page):
    html, _ = page(make_results())
    dots = [float(x) for x in re.findall(r'<svg class="dot" x="([\d.]+)%"', html)]
    end = 0.8  # the highest interval ends at 0.75; axes end at a tenth
    expected = [0.31, 0.5, 0.58, 0.7, 0.23, 0.351, 0.34, 0.4]
    assert dots == pytest.approx([100 * x / end for x in expected], abs=1e-3)


def test_the_heat_map_has_the_shares_and_frames_the_own_expert(page):
    html, p = page(make_results())
    table = html[html.index('<table class="heat">') :]
    table = table[: table.index("</table>")]
    cells = re.findall(r'<td class="shade( own)?" style="--s:([\d.]+)">(\d+)', table)
    assert cells == [(" own", "1.0", "75"), ("", "0.333", "25"), ("", "0.667", "50"), ("", "0.667", "50")]
    assert f"{math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)):.1f}" in table
    assert "(trained on this task)" in p.text


def test_the_data_is_in_the_page_unchanged(page):
    results = make_results()
    _, p = page(results, [make_prompt()])
    data = json.loads(p.scripts[0])
    assert data["format"] == FORMAT
    assert data["results"] == results
    assert [e["name"] for e in data["experts"]] == ["walk", "plural"]
    assert data["prompts"][0]["tokens"] == ["a", "walk", "\n"]
    assert unpacked(data["prompts"][0]["weights"][0]) == [750, 250, 600, 400, 1000, 0]


def test_hostile_names_and_prompts_stay_text(page):
    plain, _ = page(make_results(), [make_prompt()])
    results = make_results(a=HOSTILE, b=HOSTILE + "b", task=HOSTILE, other=HOSTILE + "c")
    for key in ("title",):
        results[key] = HOSTILE
    results["notes"] = results["base"]["notes"] = [HOSTILE]
    results["base"]["spec"] = HOSTILE
    results["recipe"] = {HOSTILE: {HOSTILE: HOSTILE}}
    results["made"] = {HOSTILE: HOSTILE}
    for system in results["systems"]:
        system["note"] = HOSTILE
    html, p = page(results, [make_prompt(HOSTILE, (HOSTILE, HOSTILE + "b"))])
    for tag in ("script", "img", "svg", "style", "table"):
        assert p.count(tag) == Page(plain).count(tag), tag
    assert not any(name.startswith("on") for _, attrs in p.tags for name in attrs)
    assert "<script>alert" not in html
    assert p.text.count(re.sub(r"\s+", " ", HOSTILE)) > 20  # word for word: nothing evaluated, nothing lost
    data = json.loads(p.scripts[0])
    assert data["results"] == results
    assert data["prompts"][0]["tokens"][1] == HOSTILE
    assert "\u2028" not in p.scripts[0]


def test_only_the_pages_own_script_may_run(page):
    html, p = page(make_results(), [make_prompt()])
    policy = next(a["content"] for t, a in p.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(p.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert p.count("script") == 2
    assert "innerHTML" not in html
    assert "insertAdjacentHTML" not in html


def test_the_page_needs_no_network(page):
    html, p = page(make_results(), [make_prompt()])
    for tag, attrs in p.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert not (attrs.get(name) or "#").lstrip().startswith(("http", "//", "data:", "file:")), (
                tag,
                attrs,
            )
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|import\(", p.scripts[1])


@pytest.mark.parametrize(
    "part", ["title", "made", "base", "recipe", "experts", "comparisons", "recovered", "shares", "notes"]
)
def test_any_optional_part_may_be_missing(page, part):
    results = make_results()
    del results[part]
    _, p = page(results, [make_prompt()])
    assert "58.0" in p.text


def test_a_bare_table_is_enough(page):
    results = {
        "tasks": [{"name": "t", "group": "in-pool"}, {"name": "u", "group": "in-pool"}],
        "systems": [{"name": "base", "kind": "base", "scores": {"t": score(0.5)}}],
    }
    html, p = page(MappingProxyType(results))
    assert "50.0" in p.text
    assert 'class="headline"' not in html
    assert "<svg" not in html
    assert "Token by token" not in p.text
    assert json.loads(p.scripts[0])["results"] == results


def test_nothing_to_show_is_refused_but_prompts_alone_are_enough(page, tmp_path):
    for nothing in (
        None,
        {"tasks": [], "systems": []},
        {"tasks": [{"name": "t", "group": "g"}], "systems": []},
    ):
        with pytest.raises(EvaluationError, match=r"results\['(tasks|systems)'\] is empty"):
            report(nothing, out=tmp_path / "page.html")
    _, p = page(None, [make_prompt()])
    assert "Token by token" in p.text
    assert "Differences" not in p.text


def test_layers_that_dont_fit_are_refused(tmp_path):
    good = {"layers": ["0"], "experts": ["walk", "plural"], "shares": [[0.5, 0.5]]}
    for change, message in (
        ({"shares": [[0.5]]}, "1 rows of 2 shares"),
        ({"shares": [[0.5, 1.5]]}, "between 0 and 1, got 1.5"),
        ({"layers": [0]}, "should be str"),
    ):
        with pytest.raises(EvaluationError, match=message):
            report({**make_results(), "layers": {"held": {**good, **change}}}, out=tmp_path / "page.html")
    with pytest.raises(EvaluationError, match="the task 'mystery'"):
        report({**make_results(), "layers": {"mystery": good}}, out=tmp_path / "page.html")
    results = make_results()
    results["experts"][0]["health"] = [{"level": "fine", "text": ""}]
    with pytest.raises(
        EvaluationError, match="the level of health 'fine' isn't there; known: 'good', 'look'"
    ):
        report(results, out=tmp_path / "page.html")


def test_in_pool_only_and_groups_of_other_names(page):
    results = make_results()
    results["tasks"] = results["tasks"][:1]
    results["tasks"][0]["group"] = "mine"
    for system in results["systems"]:
        del system["scores"]["held"]
        system["groups"] = {"mine": system["groups"]["in-pool"]}
    results |= {"comparisons": [], "recovered": {}, "shares": {}}
    _, p = page(results)
    assert "On the 1 task of “mine”, right answers: base 31.0 %, PHATGOOSE 58.0 %, oracle 70.0 %." in p.text
    assert "Held-out" not in p.text


def change(path, value):
    def apply(results):
        *inner, last = path
        for key in inner:
            results = results[key]
        if value is KeyError:
            del results[last]
        else:
            results[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("systems",), KeyError, "results lacks 'systems'"),
        (("tasks",), {}, r"results\['tasks'\] should be list, got \{\}"),
        (("tasks", 0, "group"), KeyError, r"results\['tasks'\]\[0\] lacks 'group'"),
        (("tasks", 1, "name"), "past_tense", "has 'past_tense' more than once"),
        (
            ("systems", 2, "scores", "past_tense", "mean"),
            "0.5",
            r"\['past_tense'\]\['mean'\] should be int or float, got '0.5'",
        ),
        (("systems", 2, "scores", "past_tense", "mean"), True, "should be int or float, got True"),
        (("systems", 2, "scores", "past_tense", "mean"), 58.0, "score of 'past_tense' should be a mean"),
        (("systems", 2, "scores", "past_tense", "low"), 0.9, "low ≤ high"),
        (("systems", 2, "scores", "past_tense", "low"), float("nan"), "can't be written as JSON"),
        (("systems", 2, "scores", "mystery"), score(0.5), "the task 'mystery' isn't there"),
        (("systems", 2, "groups", "mystery"), score(0.5), "the group 'mystery' isn't there"),
        (("systems", 2, "kind"), "magic", r"\[2\]\['kind'\]: the kind of system 'magic' isn't there; known: 'base'"),
        (("comparisons", 0, "b"), "bass", "the system 'bass' isn't there"),
        (("recovered", "mystery"), {"share": 1.0}, "the group 'mystery'"),
        (("shares", "mystery"), {"walk": 1.0}, "the task 'mystery'"),
        (("shares", "held", "walk"), 1.5, r"\['held'\]\['walk'\] should lie between 0 and 1, got 1.5"),
        (("experts", 1, "rank"), "8", r"\['experts'\]\[1\]\['rank'\] should be int, got '8'"),
        (("made",), {"where": object()}, "can't be written as JSON"),
        (("notes",), "text", r"results\['notes'\] should be list"),
    ],
)  # fmt: skip
def test_malformed_results_are_refused_by_name_and_nothing_is_written(tmp_path, path, value, message):
    results = copy.deepcopy(make_results())
    change(path, value)(results)
    out = tmp_path / "page.html"
    out.write_text("before")
    with pytest.raises(EvaluationError, match=message):
        report(results, out=out)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_a_prompt_that_doesnt_fit_is_refused_by_number(tmp_path):
    bad = RoutedPrompt("t", "p", "e", "a", True, ("x",), 0, ("a",), ("m",), ())
    with pytest.raises(EvaluationError, match=r"prompts\[1\] has 1 modules"):
        report(make_results(), [make_prompt(), bad], out=tmp_path / "page.html")


def test_a_page_that_cant_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        report(make_results(), out=tmp_path / "file" / "page.html")


def test_a_lone_surrogate_doesnt_stop_the_page(page):
    _, p = page(make_results(), [make_prompt("half \ud83d")])
    assert json.loads(p.scripts[0])["prompts"][0]["prompt"] == "half \ud83d"


def test_the_words_for_numbers():
    assert [percent(x) for x in (0.583, -0.05, -0.001, None, 1)] == ["58", "−5", "0", "–", "100"]
    assert [points(x) for x in (0.05, -0.05, 0.0001, -0.0001)] == ["+5.0", "−5.0", "0.0", "0.0"]
    assert [seconds(x) for x in (0.25, 40, 59.7, 75, 3600, None)] == [
        "0.2 s", "40 s", "1 min 0 s", "1 min 15 s", "60 min 0 s", "–",
    ]  # fmt: skip
    assert [letters(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
    assert str(breakable("a_<b>")) == "a_<wbr>&lt;b&gt;"
