"""`phatgoose report` of experiments: the published results, and what they say on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phatgoose.errors import EvaluationError
from phatgoose.workflows.experiment.page import FORMAT, kind_of, page_data
from phatgoose.workflows.page import for_page, page, read_results

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["bigbench-t0-2026-11-24", "bigbench-t0-seeds-2026-11-30"])
def test_the_page_of_an_experiment(name, tmp_path):
    raw = json.loads((PUBLISHED / f"{name}.json").read_text())
    found = read_results(PUBLISHED / f"{name}.json")
    text = page(tmp_path / "page.html", results=found).read_text(encoding="utf-8")
    assert "Experiment on smollm2-135m-instruct-q4" in text
    suite = raw["suites"]["in-pool"]
    systems = {s["name"]: s for s in found["systems"]}
    assert systems.keys() == suite["systems"].keys()
    assert systems["phatgoose"]["groups"]["in-pool"]["mean"] == suite["systems"]["phatgoose"]["mean"]
    one = next(c for c in found["comparisons"] if (c["group"], c["b"]) == ("in-pool", "base"))
    said = suite["against"]["phatgoose"]["base"]
    assert (one["difference"], one["low"], one["high"]) == (-said["difference"], -said["high"], -said["low"])
    assert one["difference"] == pytest.approx(suite["against"]["base"]["phatgoose"]["difference"])
    if share := suite["oracle_gain_share"].get("phatgoose"):
        assert f"{100 * share['share']:.0f}&nbsp;%</strong>" in text


def test_tasks_of_one_name_in_two_suites_are_told_apart():
    score = {"mean": 0.5, "low": 0.4, "high": 0.6, "rows": 5, "metric": "rank"}
    suite = {
        "tasks": {"t": {"spec": "jsonl:t"}}, "systems": {"base": {"tasks": {"t": score}}}, "against": {},
        "oracle_gain_share": {},
    }  # fmt: skip
    results = {"suites": {"x": suite, "y": suite}, "recipe": {"base": "b"}, "made": {}, "experts": []}
    assert [t["name"] for t in page_data(results)["tasks"]] == ["x: t", "y: t"]
    with pytest.raises(EvaluationError, match=r"incomplete or damaged.*'recipe'"):
        for_page({k: v for k, v in results.items() if k != "recipe"} | {"format": FORMAT})


def test_kinds_of_systems():
    kinds = {
        "base": "base",
        "oracle": "oracle",
        "best-single": "single",
        "ties:density=0.5": "static",
        "phatgoose": "router",
    }
    kinds |= {"random:seed=1": "control", "padded:5": "control", "arrow": "router", "model:x": "static"}
    assert {system: kind_of(system) for system in kinds} == kinds
