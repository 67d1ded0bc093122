"""The experiment's page and picture are what its results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phatgoose.workflows.experiment.documents import markdown, plot
from phatgoose.workflows.experiment.recipe import ExperimentRecipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results():
    (path,) = (ROOT / "benchmarks" / "results").glob("bigbench-t0-20*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_page_and_picture_are_the_results_own(results):
    page = (ROOT / "docs" / "experiment-bigbench-t0.md").read_text(encoding="utf-8")
    assert page == markdown(results)
    picture = (ROOT / "docs" / "images" / "experiment-bigbench-t0.svg").read_text(encoding="utf-8")
    assert picture == plot(results)


def test_admission_is_shown_where_no_task_is_left_to_compare(results):
    gains = {"mean": 0.5, "gain": 0.01, "low": -0.1, "high": 0.1}
    found = {
        "rows": 200,
        "base": 0.5,
        "own": gains,
        "sisters": {},
        "sister": None,
        "admitted": False,
        "why": "",
    }
    suite = results["suites"]["t0ho"] | {"common_tasks": [], "admission": {"alone": found}}
    page = markdown({**results, "suites": {"t0ho": suite}})
    assert "No task was measured with every system.\n\n### t0ho: not admitted\n\n" in page
    assert "| alone | 200 | 0.500 |" in page


def test_later_code_gave_the_same_scores_again(results):
    (path,) = (ROOT / "benchmarks" / "results").glob("bigbench-t0-seeds-*.json")
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["measured"]["code"] != results["measured"]["code"]
    before, after = (r["suites"]["in-pool"]["systems"] for r in (results, again))
    both = before.keys() & after.keys()
    assert both == {
        "base",
        "phatgoose",
        *(f"{c}:seed=0" for c in ("random", "fixed-random", "shuffled-gates")),
    }
    for system in both:
        assert {t: s["mean"] for t, s in before[system]["tasks"].items()} == {
            t: s["mean"] for t, s in after[system]["tasks"].items()
        }


def test_they_are_of_the_shipped_recipe(results):
    shipped = json.loads(json.dumps(ExperimentRecipe.read(ROOT / "recipes" / "bigbench-t0.toml").to_json()))
    said = results["recipe"]
    newer = {
        "page": {"prompts": 0},
        "claims": {},
    }  # sections that recipes didn't have then; none are asked for
    assert {part: shipped.pop(part) for part in newer} == newer
    assert shipped["pool"].pop("admit_rows") == 0
    unasked = {
        "measures": [],
        "admit_rows": 0,
        "admit_own_gain": 0.1,
        "admit_sister_gain": 0.04,
        "own_experts": "",
    }
    assert {setting: shipped["measure"].pop(setting) for setting in unasked} == unasked
    assert said.keys() == shipped.keys()
    for part in shipped.keys() - {"folders"}:  # whoever runs it has folders of their own
        assert said[part] == shipped[part]
    assert results["failed"] == {}
