"""The quickstart on a tiny base: what it writes, and that killing it at any moment changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny_experiment import COMMON, recipe_data, write_place

from phatgoose.errors import ExpertError, StorageError
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.workflows import quickstart
from phatgoose.workflows.experiment.systems import expanded
from phatgoose.workflows.page import page, read_results
from phatgoose.workflows.quickstart import quickstart_recipe, run_quickstart

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "results" / "quickstart-2026-11-22.json"

RUN = """
import json, sys
from rich.console import Console
from phatgoose.workflows.experiment.recipe import ExperimentRecipe
from phatgoose.workflows.quickstart import run_quickstart
recipe = ExperimentRecipe.from_json(json.loads(sys.argv[1]))
run_quickstart(sys.argv[2], recipe=recipe, console=Console(width=150))
"""


@pytest.fixture
def place(tmp_path, make_base):
    return write_place(tmp_path, make_base("llama"), held_choices=False)


def recipe(place):
    systems = ["base", "single:upper", "single:choice", "merged", "uniform", "random", "phatgoose", "oracle"]
    more = {"page": {"prompts": 2}, "claims": {"in-pool": 0.6}}
    return recipe_data(place, {**COMMON, "max_length": 64}, systems=systems, **more)


def start(place, out):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(recipe(place)), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(place, out):
    process = start(place, out)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def outcome(out):
    """results.json without times, and the pool's bytes."""
    results = json.loads((out / "results.json").read_text())
    del results["made"]
    for expert in results["experts"]:
        for key in ("expert_seconds", "gate_seconds"):
            del expert[key]
        del expert["made"]["finished"]
    return results


@pytest.mark.slow(102)
def test_killed_at_any_moment_it_ends_in_the_same_result(place):
    text = finish(place, place / "whole")
    expected = outcome(place / "whole")
    out = place / "killed"
    for wait in ("experts", "pool", "scores"):  # killed as soon as that folder appears, and once blindly
        process = start(place, out)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline and not (out / wait).exists():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "experts").glob("[!.]*/adapter_model.safetensors")}
    finish(place, out)
    assert outcome(out) == expected
    # Experts that were finished before the last kill keep their old stamps.
    made = {p: p.stat().st_mtime_ns for p in (out / "experts").glob("[!.]*/adapter_model.safetensors")}
    stamps = {**made, **stamps}
    assert len(made) == len(stamps) == 2
    finish(place, out)
    assert outcome(out) == expected
    # Finished experts were not trained again.
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    for part in (
        "PHATGOOSE",
        "oracle",
        "A gate was trained on",
        "phatgoose chat --pool",
        "Claimed beforehand",
    ):
        assert part in text
    assert re.search(r"in-pool: (PHATGOOSE recovers|the oracle gains too little)", text)
    assert re.search(r"in-pool tasks: accuracy on 6 test rows each", text)


@pytest.mark.slow(44)
def test_results_are_complete_and_consistent(place):
    finish(place, place / "out")
    results = json.loads((place / "out/results.json").read_text())
    names = recipe(place)["systems"]
    for suite in results["suites"].values():
        assert list(suite["systems"]) == names
        for task in suite["tasks"]:
            score = {name: suite["systems"][name]["tasks"][task]["mean"] for name in names}
            assert score["oracle"] in [score[n] for n in names if n.startswith("single")]
            assert score["merged"] == score["uniform"]
            assert sum(results["shares"][task].values()) == pytest.approx(1, abs=1e-2)
    assert results["resamples"] == results["evaluation"]["resamples"] == 20_000
    claim, share = (
        results["claims"]["in-pool"],
        results["suites"]["in-pool"]["oracle_gain_share"]["phatgoose"],
    )
    assert claim["share"] == share["share"]
    assert claim["holds"] == (None if share["share"] is None else share["share"] >= 0.6)
    shown = read_results(place / "out/results.json")
    assert shown["shares"] == results["shares"]
    alone = results["suites"]["in-pool"]["systems"]["single:upper"]["tasks"]["upper"]["mean"]
    assert shown["experts"][0]["own"] == alone
    text = (place / "out/quickstart.html").read_text(encoding="utf-8")
    assert "Token by token" in text
    assert "Layer by layer" in text
    (damaged,) = (place / "out/experts").glob("upper-*/adapter_model.safetensors")
    damaged.write_bytes(b"damaged")
    process = start(place, place / "out")
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "adapter_model.safetensors is not a whole safetensors file" in text
    assert ExpertError.__name__ in text


def test_other_peoples_folders_are_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for fresh in (False, True):
        with pytest.raises(StorageError, match="is not a quickstart's folder"):
            run_quickstart(tmp_path, fresh=fresh)
    assert (tmp_path / "letter.txt").exists()


def test_recipes_keep_their_promises():
    whole, smoke = quickstart_recipe(), quickstart_recipe(smoke=True)
    trained, unseen = whole.pool.tasks, whole.measure.tasks
    assert len(trained) >= 5
    assert len(unseen) >= 5
    assert not set(trained.values()) & set(unseen.values())
    assert whole.measure.test_rows == 100
    assert whole.claims == {"in-pool": 0.6}
    assert len(smoke.pool.tasks) == 2
    assert smoke.base == whole.base


def test_the_recipe_is_the_published_one():
    """Base, tasks, rows, settings and systems of the numbers in docs/results.md."""
    published, found = json.loads(PUBLISHED.read_text()), quickstart_recipe()
    said = published["recipe"]
    assert found.base == said["base"]
    assert list(found.pool.tasks.values()) == said["pool_tasks"]
    assert list(found.pool.tasks) == [e["name"] for e in published["experts"]]
    assert list(found.measure.tasks.values()) == said["held_out_tasks"]
    assert said["expert"].pop("peft_type") == "LORA"  # the setting of that time; "kind" since
    for config, settings in ((ExpertConfig, "expert"), (GateConfig, "gate")):
        assert config(**said[settings]) == getattr(found, settings)
    assert found.pool.train_rows == said["train_rows"]
    assert (found.measure.test_rows, found.measure.choice_rows) == (said["test_rows"], said["choice_rows"])
    names = {"PHATGOOSE": "phatgoose"}
    systems = [names.get(s["name"], s["name"].replace("single: ", "single:")) for s in published["systems"]]
    # Gander came later; it has a run of its own (benchmarks/results/quickstart-2026-11-30.json).
    assert [system for system in expanded(found.systems, found.seeds) if system != "gander"] == systems


def test_results_written_before_still_open(tmp_path):
    text = page(tmp_path / "page.html", results=read_results(PUBLISHED)).read_text(encoding="utf-8")
    assert "<strong>86&nbsp;%</strong>" in text


def test_what_to_type_next_is_small_and_can_be_typed(monkeypatch, tmp_path):
    """Not the paper's training, which takes days on a laptop, and with what puts phatgoose
    on the path where it isn't."""

    def said(found):
        monkeypatch.setattr(quickstart.shutil, "which", lambda _: found)
        text = StringIO()
        quickstart._print_next_steps(Console(file=text, width=1000), tmp_path, quickstart_recipe())
        return text.getvalue()

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    monkeypatch.setattr(quickstart.sys, "prefix", str(tmp_path))
    assert f". {tmp_path}/bin/activate" in said(None)
    assert "activate" not in said("/usr/bin/phatgoose")
    assert "--out my-expert --steps 60 --rows-per-step 16" in said(None)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert quickstart.SMALL in " ".join(readme.replace("\\\n", " ").split())


def test_no_difference_has_no_minus():
    nothing = {"difference": 0.0, "low": -0.1, "high": 0.0, "p": 1.0, "p_holm": 1.0}
    suite = {"oracle_gain_share": {}, "against": {"phatgoose": {"base": nothing}}}
    expert = {"gate_token_share": 0.5, "gate_parameters": 1, "parameters": 2}
    said = quickstart.conclusions({"suites": {"in-pool": suite}, "claims": {}, "experts": [expert]})
    assert "PHATGOOSE − base = +0.000 (+0.000 to +0.100): not distinguishable from base" in said[0]
