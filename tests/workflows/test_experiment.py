"""Experiments on tiny bases: whole, killed at any moment, with failing tasks and systems;
the T0 recipe from local rows."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from tiny_experiment import COMMON, recipe_data, write_place
from typer.testing import CliRunner

from conftest import write_base, write_rows
from encoder_fixtures import make_encoder, signed
from phatgoose.cli.main import app
from phatgoose.errors import PhatgooseError, StorageError, TaskError, TrainingError
from phatgoose.evaluation.statistics import paired_difference, suite_interval
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base.load import load_base
from phatgoose.records import Prediction, TaskScore
from phatgoose.routers import Single
from phatgoose.tasks.lists.named import pool_entries
from phatgoose.tasks.lists.named import suite as named_suite
from phatgoose.tasks.sources.promptsource import config_name, read_templates
from phatgoose.tasks.spec import split_spec
from phatgoose.tasks.tokenizer_loss import TokenizerLoss
from phatgoose.workflows.experiment import steps as experiment_steps
from phatgoose.workflows.experiment import worker as experiment_worker
from phatgoose.workflows.experiment.documents import markdown, plot
from phatgoose.workflows.experiment.executors import Processes
from phatgoose.workflows.experiment.recipe import ExperimentRecipe, RecipeError
from phatgoose.workflows.experiment.results import ALIKE, RESAMPLES, suite_results
from phatgoose.workflows.experiment.run import run_experiment
from phatgoose.workflows.experiment.scores import ScoreCache

RECIPES = Path(__file__).parents[2] / "recipes"
SYSTEMS = ["base", "phatgoose", "uniform", "merged", "random:seed={seed}", "best-single", "oracle"]


@pytest.fixture
def place(tmp_path, make_base):
    return write_place(tmp_path, make_base("llama"))


def recipe(place, **changes):
    return ExperimentRecipe.from_json(recipe_data(place, **{"systems": SYSTEMS, "seeds": [0, 1], **changes}))


def everything(place):
    """With every kind of step: signatures, a multitask expert, experts to choose among, merges."""
    more = ["average-activation", "multitask", "ties", "dare", "padded:2"]
    signature = {"rows": 8, "rows_per_batch": 4, "max_length": 96, "texts": 0}
    return recipe(place, systems=[*SYSTEMS, *more], signature=signature)


def outcome(out):
    """results.json without times."""
    results = json.loads((out / "results.json").read_text())
    del results["made"]
    for expert in (*results["experts"], results["multitask"] or {}):
        for key in ("expert_seconds", "gate_seconds", "signature_seconds"):
            expert.pop(key, None)
    return results


RUN = """
import json, sys
from phatgoose.workflows.experiment.run import run_experiment
from phatgoose.workflows.experiment.recipe import ExperimentRecipe
from phatgoose.workflows.experiment.executors import Processes
if __name__ == "__main__":
    executor = Processes(1)
    run_experiment(ExperimentRecipe.from_json(json.loads(sys.argv[1])), sys.argv[2], executor=executor)
    executor.close()
"""


def start(place, out):
    script = place / "run.py"
    script.write_text(RUN)
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(everything(place).to_json()), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(place, out):
    process = start(place, out)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text


@pytest.mark.slow(39)
def test_killed_at_any_moment_it_ends_in_the_same_result(place):
    seed = random.randrange(2**32)
    print(f"kills at moments of seed {seed}")  # shown if this fails
    moments = random.Random(seed)
    finish(place, place / "whole")
    expected = outcome(place / "whole")
    out = place / "killed"
    for wait in ("work", "experts", "pool", "scores"):
        process = start(place, out)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline and not (out / wait).exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.6))
        os.killpg(process.pid, signal.SIGKILL)  # driver and workers
        process.communicate()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "experts").glob("*/adapter_model.safetensors")}
    scores = {p: p.stat().st_mtime_ns for p in (out / "scores").glob("*.json")}
    finish(place, out)
    assert outcome(out) == expected
    assert all(p.stat().st_mtime_ns == t for p, t in (stamps | scores).items())
    # A worker alone: the run itself goes on.
    executor, out = Processes(1, environment={"OMP_NUM_THREADS": "1"}), place / "bereft"
    killed = []

    def kill():
        for wait in ("work", "scores"):
            deadline = time.time() + 120
            while not (out / wait).exists() and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            worker = executor._workers.get(0)
            with contextlib.suppress(AttributeError, ValueError, ProcessLookupError):  # it has just ended
                os.kill(worker.process.pid, signal.SIGKILL)
                killed.append(worker.process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        run_experiment(everything(place), out, executor=executor)
    finally:
        thread.join(60)
        executor.close()
    assert killed
    assert outcome(out) == expected


@pytest.fixture
def ready(place, make_base, make_expert):
    """A pool that others made, of the recipe's base: an expert for the task "upper", one without a task."""
    base = load_base(str(place / "base"), dtype="float32")
    theirs = replace(make_base("llama"), spec="tiny-llama-0")
    made = [make_expert(theirs, name, seed=n, scale=0.4) for n, name in enumerate(("upper", "stranger"))]
    pool = Pool([replace(e, provenance={"base": base.fingerprint.to_json()}) for e in made])
    pool.save(place / "ready")
    return pool


def test_experts_that_are_there_are_taken_and_the_others_trained(place, ready, monkeypatch):
    trained, real = [], experiment_steps.train
    monkeypatch.setattr(experiment_steps, "train", lambda *a, **k: trained.append(k["name"]) or real(*a, **k))
    asked = recipe(place, pool={**recipe(place).to_json()["pool"], "folder": str(place / "ready")})
    results = run_experiment(asked, place / "out")
    assert trained == ["choice"]
    upper, choice, stranger = results["experts"]
    assert [e["name"] for e in results["experts"]] == ["upper", "choice", "stranger"]
    assert upper["hash"] == ready["upper"].hash
    assert stranger["hash"] == ready["stranger"].hash
    assert upper["taken"]
    assert stranger["taken"]
    assert "taken" not in choice
    assert (stranger["task"], upper["task"]) == (None, "upper")
    assert sorted(results["suites"]["in-pool"]["tasks"]) == ["choice", "upper"]
    # What upper saw isn't known: its record names no rows, so the recipe's task of its name says nothing of them.
    assert results["training_rows"] == {"read": ["choice"], "unread": ["upper", "stranger"]}
    assert set(results["chosen"]["oracle"]["in-pool"].values()) <= {"upper", "choice", "stranger"}
    assert results["complete"]
    first = outcome(place / "out")
    stamps = {
        p: p.stat().st_mtime_ns for p in (place / "out" / "experts").glob("*/adapter_model.safetensors")
    }
    run_experiment(asked, place / "out")
    assert outcome(place / "out") == first
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())


def test_a_process_loads_its_base_once(place, monkeypatch):
    """Also where steps that read the pool and steps that don't take turns."""
    loaded, real = [], experiment_worker.load_base
    monkeypatch.setattr(experiment_worker, "load_base", lambda *a, **k: loaded.append(a) or real(*a, **k))
    made = recipe(place, systems=["base", "phatgoose", "oracle"], page={"prompts": 1})
    assert run_experiment(made, place / "out")["shares"].keys() == {"upper", "choice", "held"}
    assert len(loaded) == 1


def test_a_pool_of_experts_without_tasks_is_compared_on_what_is_unseen(place, ready):
    pool = {"folder": str(place / "ready")}
    measure = {**recipe(place).to_json()["measure"], "suites": ["unseen"]}
    results = run_experiment(recipe(place, pool=pool, measure=measure), place / "out")
    assert [e["name"] for e in results["experts"]] == ["upper", "stranger"]
    assert results["complete"]
    assert results["suites"]["unseen"]["common_tasks"] == ["held"]
    assert results["suites"]["unseen"]["contamination"] == {}  # nothing to hold its rows against, and said so
    assert results["training_rows"] == {"read": [], "unread": ["upper", "stranger"]}
    said = (place / "out/results.md").read_text()
    assert "Contamination: not looked at: the training rows of upper, stranger." in said
    assert "none of" not in said
    alone = run_experiment(
        recipe(place, pool={**pool, "only": ["stranger"]}, measure=measure), place / "alone"
    )
    assert [e["name"] for e in alone["experts"]] == ["stranger"]


def test_gander_is_compared_with_and_without_settings(place, ready):
    """Its settings count, and what it can't do in a model of two blocks is said."""
    measure = {**recipe(place).to_json()["measure"], "suites": ["unseen"]}
    systems = ["base", "gander", "gander:layers=1", "gander:half_life=1", "gander:layers=2"]
    found = recipe(place, pool={"folder": str(place / "ready")}, measure=measure, systems=systems)
    results = run_experiment(found, place / "out")
    scored = results["suites"]["unseen"]["systems"]
    assert set(scored) == {"base", "gander", "gander:layers=1", "gander:half_life=1"}
    assert scored["gander"] == scored["gander:layers=1"]
    (failure,) = results["failed"].items()
    assert failure[0].startswith("gander:layers=2 on unseen")
    assert "set layers lower" in failure[1]


def test_a_suite_is_refused_for_experts_that_say_they_were_trained_on_it(place, ready):
    said = {
        "task": {"name": "stranger", "source": {"source": "union", "parts": [
            {"spec": "hf:some/rows?input={a} + {b}"}, {"spec": "mine"}, {"spec": "bigbench:hyperbaton?few=1"}]}}
    }  # fmt: skip
    knows = replace(ready["stranger"], provenance={**ready["stranger"].provenance, **said})
    Pool([ready["upper"], knows]).save(place / "knows")
    pool = {**recipe(place).to_json()["pool"], "folder": str(place / "knows")}
    asked = recipe(place, pool=pool, measure={"suites": ["quickstart"], "test_rows": 2})
    with pytest.raises(TaskError, match=r"'quickstart'.*stranger \(bigbench/hyperbaton\)"):
        run_experiment(asked, place / "out")
    assert not list((place / "out").glob("work/*"))  # before anything was trained


@pytest.mark.slow(3)
def test_what_was_trained_here_gives_the_same_numbers_when_it_is_taken(place):
    systems = [*SYSTEMS, "average-activation"]
    signature = {"rows": 8, "rows_per_batch": 4, "max_length": 96, "texts": 0}
    trained = recipe(place, systems=systems, signature=signature)
    whole = run_experiment(trained, place / "out")
    pool = {**trained.to_json()["pool"], "folder": str(place / "out" / "pool")}
    again = run_experiment(recipe(place, systems=systems, signature=signature, pool=pool), place / "again")
    assert again["suites"] == whole["suites"]
    assert again["training_rows"] == whole["training_rows"] == {"read": ["upper", "choice"], "unread": []}
    assert [e["signature"] for e in again["experts"]] == [e["signature"] for e in whole["experts"]]
    assert not (place / "again" / "work").exists()
    bare = [replace(e, signature=None) for e in Pool.load(place / "out" / "pool").experts]
    Pool(bare).save(place / "bare")  # no signatures: made here, from the tasks' rows
    pool["folder"] = str(place / "bare")
    signed = run_experiment(recipe(place, systems=systems, signature=signature, pool=pool), place / "signed")
    assert signed["suites"] == whole["suites"]


def test_an_expert_is_taken_with_the_signature_it_has_now(place, ready):
    folder = make_encoder(place / "encoder", max_tokens=60)
    measure = {**recipe(place).to_json()["measure"], "suites": ["unseen"]}
    for seed in (1, 2):
        pool = place / f"signed-{seed}"
        Pool([signed(e, folder, seed=seed, count=5) for e in ready.experts]).save(pool)
        asked = recipe(place, pool={"folder": str(pool)}, measure=measure)
        found = experiment_steps.take({"recipe": asked.to_json(), "out": str(place / "out")})
        for name, record in found["taken"].items():
            copy = Expert.load(place / "out" / "experts" / record["folder"])
            assert copy.signature.hash == record["signature"] == Pool.load(pool)[name].signature.hash


def test_experts_of_another_base_are_refused_by_name(place, make_base, make_expert):
    Pool([make_expert(make_base("llama", seed=9), "choice", seed=5)]).save(place / "wrong")
    folder = {"folder": str(place / "wrong")}
    unseen = {**recipe(place).to_json()["measure"], "suites": ["unseen"]}
    with pytest.raises(
        RecipeError, match=r"no expert could be taken or trained.*'choice': expected the base"
    ):
        run_experiment(recipe(place, pool=folder, measure=unseen), place / "none")
    asked = recipe(place, pool={**recipe(place).to_json()["pool"], **folder})
    results = run_experiment(asked, place / "out")  # its task leaves with it, nothing is trained in its stead
    assert [e["name"] for e in results["experts"]] == ["upper"]
    assert "not the same model" in results["failed"]["take choice"]
    assert list(results["suites"]["in-pool"]["tasks"]) == ["upper"]
    assert "choice" in results["suites"]["in-pool"]["left_out"]


@pytest.mark.parametrize(
    ("pool", "systems", "error", "says"),
    [
        ({"only": ["stranger", "nobody"]}, SYSTEMS, RecipeError, "'nobody'"),
        ({"leave_out": ["upper", "stranger"]}, SYSTEMS, RecipeError, "no expert of .* is left"),
        (
            {},
            [*SYSTEMS, "multitask"],
            RecipeError,
            "multitask needs the data of every expert: name tasks for upper, stranger",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_pool_is_refused_by_name(place, ready, pool, systems, error, says):
    asked = recipe(
        place,
        systems=systems,
        pool={"folder": str(place / "ready"), **pool},
        measure={**recipe(place).to_json()["measure"], "suites": ["unseen"]},
    )
    with pytest.raises(error, match=says):
        run_experiment(asked, place / "out")


def test_a_pool_is_named_on_the_command_line_too(place, ready):
    file = place / "recipe.toml"
    file.write_text(
        f'base = "{place}/base"\n[pool]\n'
        f'tasks = {{ upper = "jsonl:{place}/upper.jsonl", choice = "jsonl:{place}/choice.jsonl" }}\n'
    )
    (place / "sub").mkdir()
    inside = place / "sub" / "recipe.toml"
    inside.write_text(file.read_text() + 'folder = "../ready"\n')
    for arguments in ([str(file), "--pool", str(place / "ready")], [str(inside)]):
        shown = CliRunner().invoke(app, ["experiment", *arguments, "--check"])
        assert shown.exit_code == 0, shown.output
        assert "3: 2 of" in shown.output.replace("\n", " ")
        assert "1 to train" in " ".join(shown.output.split())
    shown = CliRunner().invoke(app, ["experiment", str(file), "--pool", str(place / "sub"), "--check"])
    assert shown.exit_code == 1
    assert "pool.json" in shown.output


@pytest.mark.slow(18)
def test_the_command_on_ray_gives_the_same_numbers_and_says_what_failed(place):
    """A real local cluster, relative paths, a failing task; then the same recipe in one process, anew."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'phatgoose[ray]'")
    steps = "\n".join(f"{k} = {v}" for k, v in COMMON.items())
    (place / "recipe.toml").write_text(
        'base = "base"\ndtype = "float32"\nsystems = ["base", "phatgoose", "best-single"]\n'
        '[pool]\ntrain_rows = 20\ntasks = { upper = "jsonl:upper.jsonl", choice = "jsonl:choice.jsonl" }\n'
        '[measure]\nsuites = ["in-pool", "unseen"]\ntest_rows = 4\nchoice_rows = 2\n'
        'tasks = { held = "jsonl:held.jsonl", gone = "jsonl:gone.jsonl" }\n'
        f"[expert]\nrank = 2\nsteps = 2\n{steps}\n[gate]\nsteps = 2\n{steps}\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    found = []
    for more in (["--ray", "local"], ["--workers", "0", "--fresh"]):
        command = [
            sys.executable,
            "-m",
            "phatgoose.cli.main",
            "experiment",
            "recipe.toml",
            "--out",
            "out",
            *more,
        ]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 1, done.stdout + done.stderr
        said = " ".join((done.stdout + done.stderr).split())
        assert "gone.jsonl does not exist" in said
        assert "in-pool, mean of 2 tasks" in said
        found.append(outcome(place / "out"))
    assert list(found[0]["failed"]) == ["unseen: gone"]
    assert found[0] == found[1]


def test_fresh_spares_the_pool_that_is_to_be_taken(place, ready):
    Pool(ready.experts).save(place / "out" / "pool")
    (place / "recipe.toml").write_text(f'base = "{place}/base"\n[measure]\nsuites = ["quickstart"]\n')
    arguments = ["--pool", str(place / "out/pool"), "--out", str(place / "out"), "--fresh"]
    shown = CliRunner().invoke(app, ["experiment", str(place / "recipe.toml"), *arguments])
    assert shown.exit_code == 1
    assert "--fresh would remove the pool" in " ".join(shown.output.split())
    assert Pool.load(place / "out" / "pool").names == ready.names


@pytest.mark.slow(3)
def test_data_signatures_a_multitask_expert_and_another_model_are_compared_too(place, make_base):
    other = make_base("t5", seed=3)
    other.model.save_pretrained(place / "other")
    other.tokenizer.save_pretrained(place / "other")
    encoder = make_encoder(place / "encoder", max_tokens=60)
    systems = [
        "base", "phatgoose", "average-activation", "retrieval", "centroid", "soft-centroid",
        "soft-centroid:every=0", "multitask", f"model:{place / 'other'}",
    ]  # fmt: skip
    changes = {
        "systems": systems, "signature": {"rows": 9, "texts": 8, "encoder": str(encoder)},
        "multitask": {"rank": 2, "steps": 6, **COMMON},
    }  # fmt: skip
    plain = run_experiment(recipe(place, systems=["base", "phatgoose"]), place / "out")
    before = {p: p.stat().st_mtime_ns for p in (place / "out/scores").glob("*.json")}
    made = recipe(place, **changes)
    assert ExperimentRecipe.from_json(json.loads(json.dumps(made.to_json()))) == made
    results = run_experiment(made, place / "out")
    assert results["failed"] == {}
    assert all(
        p.stat().st_mtime_ns == t for p, t in before.items()
    )  # what was measured without signatures is found again
    assert [e["hash"] for e in results["experts"]] == [e["hash"] for e in plain["experts"]]
    assert [(e["signature_rows"], e["signature_texts"]) for e in results["experts"]] == [(9, 8), (9, 8)]
    together = results["multitask"]
    assert (together["steps"], together["rows"]) == (
        6,
        2 * 4 * 4,
    )  # of each task what its expert saw: 4 steps of 4 rows
    assert "gate_seconds" not in together
    for suite in results["suites"].values():
        assert list(suite["systems"]) == systems
        assert len(suite["common_tasks"]) == len(suite["tasks"])
    upper = {s: v["tasks"]["upper"]["rows"] for s, v in results["suites"]["in-pool"]["systems"].items()}
    assert set(upper.values()) == {6}
    stamps = {p: p.stat().st_mtime_ns for p in (place / "out").rglob("*.safetensors")}
    assert run_experiment(made, place / "out")["suites"] == results["suites"]
    assert {p: p.stat().st_mtime_ns for p in (place / "out").rglob("*.safetensors")} == stamps


def test_every_task_is_the_same_part_of_what_a_multitask_expert_learns(place, monkeypatch):
    splits = ["train"] * 10 + ["validation", "test"] * 2
    write_rows(
        place / "upper.jsonl",
        [{"input": f"upper of {i}:", "target": "yes", "split": s} for i, s in enumerate(splits)],
    )
    made = recipe(
        place,
        systems=["base", "multitask"],
        measure={"suites": ["in-pool"], "test_rows": 2, "choice_rows": 1},
        pool={"tasks": {n: f"jsonl:{place}/{n}.jsonl" for n in ("upper", "choice")}, "train_rows": 2000},
        expert={"rank": 2, "steps": 4, **COMMON, "seed": 3},
    )
    unions, contribute = [], experiment_steps.contribute

    def watch(base, task, *given, **more):
        unions.extend([task] if task.name == "multitask" else [])
        return contribute(base, task, *given, **more)

    monkeypatch.setattr(experiment_steps, "contribute", watch)
    run_experiment(made, place / "out")
    (union,) = unions
    counts = Counter(e.input.split()[0] for e in union.train)
    assert counts == {"upper": 16, "is": 16}
    assert max(Counter(union.train).values()) == 2  # a task of few rows shows them all before any comes again
    assert max(Counter(e for e in union.train if e.choices).values()) == 1
    assert Counter(e.input.split()[0] for e in union.validation) == {"upper": 2, "is": 2}


@pytest.mark.slow(3)
def test_a_multitask_expert_of_other_data_is_not_measured(place, monkeypatch):
    made = recipe(place, systems=["base", "multitask"], measure={"suites": ["in-pool"], "test_rows": 2})
    assert "mean" in run_experiment(made, place / "out")["suites"]["in-pool"]["systems"]["multitask"]
    write_rows(place / "upper.jsonl", [{"input": f"UPPER of {i}:", "target": "yes"} for i in range(60)])
    contribute = experiment_steps.contribute

    def broken(base, task, *given, **more):
        if task.name == "multitask":
            raise TrainingError("no room")
        return contribute(base, task, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(experiment_steps, "contribute", broken)
        results = run_experiment(made, place / "out")
    assert results["failed"] == {"train multitask": "TrainingError: no room"}
    assert list(results["suites"]["in-pool"]["systems"]) == ["base"]
    stale = experiment_worker.worker_state({"recipe": made.to_json(), "out": str(place / "out")})
    with pytest.raises(PhatgooseError, match="isn't this run's"):
        stale.system("multitask", "another's hash")


def test_a_model_whose_tokenizer_loses_a_task_is_not_measured_on_it(place, make_base, monkeypatch):
    made = recipe(place, systems=["base", f"model:{place / 'base'}"])
    monkeypatch.setattr(
        experiment_steps,
        "tokenizer_loss",
        lambda tokenizer, task: TokenizerLoss(0.5 if task.name == "held" else 0.0, 0.0),
    )
    monkeypatch.setattr(experiment_steps, "check_tasks", check_without_loss)
    results = run_experiment(made, place / "out")
    (why,) = results["failed"].values()
    assert "tokenizer can't write it: 50% of its rows" in why
    same = results["suites"]["in-pool"]["systems"]
    assert same["base"]["tasks"] == same[f"model:{place / 'base'}"]["tasks"]


def check_without_loss(**given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_steps, "tokenizer_loss", lambda tokenizer, task: TokenizerLoss(0.0, 0.0))
        return CHECK(**given)


CHECK = experiment_steps.check_tasks


@pytest.mark.slow(3)
def test_results_hold_together(place):
    executor = Processes(1)
    try:
        results = run_experiment(recipe(place, systems=[*SYSTEMS, "own"]), place / "out", executor=executor)
    finally:
        executor.close()
    assert results["complete"]
    assert not results["failed"]
    assert [e["name"] for e in results["experts"]] == ["upper", "choice"]
    common = [
        "base",
        "phatgoose",
        "uniform",
        "merged",
        "random:seed=0",
        "random:seed=1",
        "best-single",
        "oracle",
    ]
    own = results["suites"]["in-pool"]["systems"]["own"]
    for name, tasks, more in (("in-pool", ["upper", "choice"], ["own"]), ("unseen", ["held"], [])):
        suite = results["suites"][name]
        systems = [*common, *more]
        assert list(suite["systems"]) == systems
        assert suite["common_tasks"] == tasks
        assert suite["systems"]["merged"]["mean"] == suite["systems"]["uniform"]["mean"]
        for other in ("base", "phatgoose"):
            assert set(suite["against"][other]) == set(systems) - {other}
            for system, found in suite["against"][other].items():
                means = [suite["systems"][s]["mean"] for s in (system, other)]
                assert found["difference"] == pytest.approx(means[0] - means[1])
                assert found["low"] <= found["difference"] <= found["high"]
                assert found["p"] <= found["p_holm"] <= 1
        assert set(results["chosen"]["oracle"][name]) == set(tasks)
        assert len(set(results["chosen"]["best-single"][name].values())) == 1
    text = (place / "out/results.md").read_text()
    for part in ("| system | mean |", "| phatgoose |", "## unseen", "Contamination: ", '"train_rows": 20'):
        assert part in text
    lines = text.partition("## Overview")[2].partition("## in-pool")[0].splitlines()
    overview = {cells[1].strip(): cells[2:-1] for line in lines if len(cells := line.split("|")) > 3}
    assert set(overview) == {"system", "---", *common, "own", "*guessing*", "*blind choice*"}
    for system in common:
        for place_of, name in enumerate(("in-pool", "unseen")):
            suite = results["suites"][name]
            found = suite["against"]["base"].get(system, {"p_holm": 1.0, "difference": 0.0})
            mark = "" if found["p_holm"] >= 0.05 else " ▲" if found["difference"] > 0 else " ▼"
            assert overview[system][place_of].strip() == f"{suite['systems'][system]['mean']:.3f}{mark}"
    assert overview["own"][1].strip() == ""
    assert list(overview)[-3:] == ["own", "*guessing*", "*blind choice*"]  # own: measured on fewer suites
    guess, blind = (overview[f"*{kind}*"][0].strip() for kind in ("guessing", "blind choice"))
    assert f"Guessing scores {guess}, blind choice {blind}." in text
    assert (float(guess), float(blind)) == (
        pytest.approx(
            (1 + max(0.5, results["suites"]["in-pool"]["tasks"]["choice"]["commonest"])) / 2, abs=5e-4
        ),
        0.25,
    )
    assert "| task | rows | measure | guessing | oracle's expert |" in text
    assert (
        f"| upper | 6 | exact match | 1.00 | {results['chosen']['oracle']['in-pool']['upper']} (on 3) |"
        in text
    )
    made = results["made"]
    assert {"torch", "peft", "accelerate", "datasets", "rouge-score"} <= set(made)
    files = [json.loads(p.read_text()) for p in (place / "out/scores").glob("*.json")]
    routed = [
        f["made"]["seconds"]
        for f in files
        if f["key"]["router"] and f["key"]["router"]["router"] == "PHATGOOSE"
    ]
    for system, suites in made["measuring_seconds"].items():
        assert set(suites) == {n for n, s in results["suites"].items() if system in s["systems"]}
    assert sum(made["measuring_seconds"]["phatgoose"].values()) == pytest.approx(sum(routed), abs=0.11)
    measured = results["measured"]
    assert {k: len(v) for k, v in measured.items()} == dict.fromkeys((*ALIKE, "base"), 1)
    assert (measured["dtype"], measured["device"]) == (["torch.float32"], ["cpu"])
    assert measured["base"][0]["architecture"]["model_type"] == "llama"
    assert "Scores were computed in float32 on cpu (threads: " in text
    assert "Not all in one way" not in text
    mixed = markdown({**results, "measured": {**measured, "device": ["cpu", "cuda"], "threads": [1, 2]}})
    assert "on cpu and cuda (threads: 1 and 2)" in mixed
    assert "Not all in one way: device, threads differ." in mixed
    choice = results["suites"]["in-pool"]["tasks"]["choice"]
    assert choice["chance"] == 0.5
    assert (
        f"| choice | {choice['test_rows']} | accuracy (rank) | {max(0.5, choice['commonest']):.2f} |" in text
    )
    for given_away in ("results.json", "results.md", "plot.svg"):
        assert str(place) not in (place / "out" / given_away).read_text()
    kept = [json.loads(p.read_text()) for p in (place / "out" / "scores").glob("*.json")]
    pool = Pool.load(place / "out" / "pool")
    for task, score in own["tasks"].items():
        alone = [[task, pool[task].hash]]
        files = [f for f in kept if f["key"]["experts"] == alone and f["key"]["split"] == "test"]
        assert score["mean"] in [
            f["scores"]["tasks"][0]["mean"] for f in files if f["scores"]["tasks"][0]["task"] == task
        ]
    svg = ET.fromstring((place / "out/plot.svg").read_text())
    assert len(svg.findall(".//{http://www.w3.org/2000/svg}circle")) == 2 * len(common) + 1


@pytest.mark.parametrize("other", [(2, "hash"), (1, "another")])
def test_systems_of_different_rows_are_not_compared(other):
    """Data that changed while it was measured, or isn't the same on all machines, costs its own task."""

    def score(rows, task_hash):
        return TaskScore(
            "t", "test", "exact match", 1.0, 1.0, 1.0, rows, task_hash, (Prediction(True, "a"),) * rows
        )

    one = score(1, "hash")
    table = {"base": {"t": one, "u": one}, "phatgoose": {"t": score(*other), "u": one}}
    found = suite_results(table, {"t": "hash", "u": "hash"})
    assert found["unlike"] == ["t"]
    assert found["common_tasks"] == ["u"]


@pytest.mark.slow(3)
@pytest.mark.parametrize("moment", ["base", "phatgoose"])
def test_a_task_whose_data_changed_meanwhile_leaves_the_comparison_and_is_said(place, monkeypatch, moment):
    """Its file is written anew before the first system, or between two, each of which a worker of its own measures."""
    measure = experiment_steps.measure

    def edited(run, system, **asked):
        if system == moment:
            write_rows(place / "held.jsonl", [{"input": f"new {i}", "target": "yes"} for i in range(12)])
            experiment_worker._cached_state.cache_clear()
        return measure(run, system=system, **asked)

    monkeypatch.setattr(experiment_steps, "measure", edited)
    measured = {
        "suites": ["in-pool", "unseen"], "tasks": {"held": f"jsonl:{place}/held.jsonl"}, "test_rows": 4,
        "choice_rows": 2,
    }  # fmt: skip
    results = run_experiment(recipe(place, systems=["base", "phatgoose"], measure=measured), place / "out")
    assert "weren't the same" in results["failed"]["unseen: held"]
    assert "weren't the same" in results["suites"]["unseen"]["left_out"]["held"]
    assert results["suites"]["in-pool"]["common_tasks"]
    assert "weren't the same" in (place / "out/results.md").read_text()


def test_experts_that_do_not_gain_over_the_base_stay_out_of_the_pool(place, monkeypatch):
    """As if the expert of "upper" were right on all rows, and that of "choice" on as many as the base."""
    asked = []

    def score(self, task, pool, router, *, split="test", limit):
        made = real(self, task, pool, router, split=split, limit=limit)
        if split == "validation":
            asked.append((task.name, pool and pool.names, limit))
            right = task.name == "upper" and pool is not None
            points = tuple(replace(p, correct=right, value=None) for p in made.predictions)
            return replace(made, predictions=points)
        return made

    real = ScoreCache.score
    monkeypatch.setattr(ScoreCache, "score", score)
    data = recipe_data(place, systems=["base", "phatgoose"])
    data["pool"]["admit_rows"] = 5
    results = run_experiment(ExperimentRecipe.from_json(data), place / "out")
    assert sorted(asked, key=str) == [
        ("choice", ("choice",), 5), ("choice", None, 5), ("upper", ("upper",), 5), ("upper", None, 5),
    ]  # fmt: skip
    assert [e["name"] for e in results["experts"]] == ["upper"]
    assert results["admission"]["choice"] == {"gain": 0, "low": 0, "high": 0, "rows": 5}
    assert results["admission"]["upper"]["low"] == 1
    assert results["complete"]
    assert list(results["suites"]["in-pool"]["tasks"]) == ["upper"]
    assert "doesn't gain over the base" in results["suites"]["in-pool"]["left_out"]["choice"]
    assert "Not in the pool: choice gains +0.000" in markdown(results)
    data["pool"]["only"] = ["choice"]
    with pytest.raises(RecipeError, match="no expert gains over the base"):
        run_experiment(ExperimentRecipe.from_json(data), place / "none")


@pytest.mark.slow(3)
def test_what_fails_costs_only_itself(place):
    write_rows(place / "broken.jsonl", [{"input": "x", "target": "y", "choices": ["a", "b"]}])
    write_rows(place / "long.jsonl", [{"input": f"q {i}", "target": "yes " * 200} for i in range(60)])
    tasks = {n: f"jsonl:{place}/{n}.jsonl" for n in ("upper", "broken", "long", "choice")}
    measure = {
        "suites": ["in-pool", "unseen"], "test_rows": 6, "choice_rows": 3,
        "tasks": {"held": f"jsonl:{place}/held.jsonl", "gone": f"jsonl:{place}/gone.jsonl"},
    }  # fmt: skip
    made = recipe(
        place,
        systems=["base", "phatgoose", "single:long"],
        measure=measure,
        pool={"tasks": tasks, "train_rows": 20},
    )
    results = run_experiment(made, place / "out")
    assert not results["complete"]
    assert [e["name"] for e in results["experts"]] == ["upper", "choice"]
    failed = results["failed"]
    assert "is not among the choices" in failed["in-pool: broken"]
    assert "leaves no room" in failed["train long"]
    assert results["suites"]["in-pool"]["common_tasks"] == [
        "upper",
        "choice",
    ]  # no expert, so not in its pool
    assert results["suites"]["in-pool"]["left_out"]["long"] == "its expert couldn't be taken or trained"
    assert "does not exist" in failed["unseen: gone"]
    assert "unknown expert 'long'" in failed["single:long on unseen: held"]
    assert list(results["suites"]["unseen"]["systems"]) == ["base", "phatgoose"]
    assert results["suites"]["unseen"]["common_tasks"] == ["held"]
    assert "leaves no room" in (place / "out/results.md").read_text()
    # Once the data is mended, the same folder goes on.
    write_rows(
        place / "gone.jsonl",
        [{"input": f"gone {i}", "target": "yes", "choices": ["yes", "no"]} for i in range(30)],
    )
    again = run_experiment(made, place / "out")
    assert again["suites"]["unseen"]["common_tasks"] == ["held", "gone"]


def test_an_error_that_nobody_expected_costs_its_task_too(place, monkeypatch):
    measure = ScoreCache.measure

    def broken(self, task, pool, router, **more):
        if task.name == "choice" and pool is not None and len(pool.names) > 1:
            raise RuntimeError("CUDA out of memory")
        return measure(self, task, pool, router, **more)

    made = recipe(place, systems=["base", "phatgoose"])
    with monkeypatch.context() as patch:
        patch.setattr(ScoreCache, "measure", broken)
        results = run_experiment(made, place / "out")
    assert list(results["failed"]) == ["phatgoose on in-pool: choice"]
    assert results["failed"]["phatgoose on in-pool: choice"].startswith("RuntimeError: CUDA out of memory (")
    assert results["suites"]["in-pool"]["common_tasks"] == ["upper"]
    again = run_experiment(made, place / "out")
    assert again["suites"]["in-pool"]["common_tasks"] == ["upper", "choice"]


def test_a_task_without_rows_to_choose_on_is_named(place):
    write_rows(place / "lone.jsonl", [{"input": "a lone row", "target": "yes", "choices": ["yes", "no"]}])
    tasks = {n: f"jsonl:{place}/{n}.jsonl" for n in ("held", "lone")}
    for systems, common in ((["base", "oracle"], ["held"]), (["base", "best-single"], ["held", "lone"])):
        measure = {"suites": ["unseen"], "tasks": tasks, "test_rows": 6, "choice_rows": 3}
        results = run_experiment(recipe(place, systems=systems, measure=measure), place / "out")
        suite = results["suites"]["unseen"]
        assert suite["common_tasks"] == common
        assert list(suite["left_out"]) == [t for t in tasks if t not in common]
    assert results["complete"]


def test_a_training_that_was_stopped_is_no_obstacle_to_other_data(place, monkeypatch):
    made = recipe(place, systems=["base", "phatgoose"])

    def killed(*given, **more):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.workflows.contribute.train_gate", killed)
        with pytest.raises(RecipeError, match="no expert could be"):
            run_experiment(made, place / "out")
    left = sorted(p.name for p in (place / "out/work").iterdir())
    assert len(left) == 2
    write_rows(place / "upper.jsonl", [{"input": f"UPPER of {i}:", "target": "yes"} for i in range(60)])
    results = run_experiment(made, place / "out")
    assert results["complete"]
    assert not list((place / "out/work").iterdir())


def test_a_plot_keeps_every_character_of_a_name():
    name = "model:a\u2028b\x85c"  # both end a line for str.splitlines
    suite = {
        "common_tasks": ["t"],
        "tasks": {"t": {"commonest": 0.4, "chance": None}},
        "systems": {name: {"mean": 0.5, "low": 0.4, "high": 0.6}},
    }
    svg = plot({"suites": {"s": suite}})
    assert f">{name}</text>" in svg
    assert svg.count("\n") == 1


def test_a_row_that_cannot_be_chosen_on_costs_its_task(place):
    rows = [{"input": f"o {i}", "target": "yes", "choices": ["yes", "no"], "split": "test"} for i in range(8)]
    rows.append({"input": "v", "target": "yes " * 5000 + "x", "split": "validation"})
    write_rows(place / "odd.jsonl", rows)
    tasks = {n: f"jsonl:{place}/{n}.jsonl" for n in ("held", "odd")}
    measure = {"suites": ["unseen"], "tasks": tasks, "test_rows": 6, "choice_rows": 3}
    systems = ["base", "phatgoose", "best-single", "oracle"]
    results = run_experiment(recipe(place, systems=systems, measure=measure), place / "out")
    assert list(results["failed"]) == ["choose on unseen: odd"]
    suite = results["suites"]["unseen"]
    assert suite["common_tasks"] == ["held"]
    assert list(suite["systems"]) == systems
    assert set(results["chosen"]["best-single"]["unseen"]) == {"held", "odd"}
    assert set(results["chosen"]["oracle"]["unseen"]) == {"held"}


def test_oracle_and_best_single_take_what_is_best_on_validation_rows_alone(place, ready, monkeypatch):
    """By numbers that leave no doubt, and that test rows have nothing to do with."""
    best = {"in-pool": {"upper": "stranger"}, "unseen": {"held": "upper"}}

    def chosen(run, pool, expert, suite, tasks):
        right = {t: best[suite][t] == expert for t in tasks}
        return {"scores": {t: [0.75 if right[t] else 0.25, None] for t in tasks}, "failed": {}}

    monkeypatch.setattr(experiment_steps, "choose", chosen)
    pool = {"tasks": {"upper": f"jsonl:{place}/upper.jsonl"}, "folder": str(place / "ready")}
    made = recipe(place, systems=["base", "oracle", "best-single"], pool=pool)
    results = run_experiment(made, place / "out")
    for suite, picks in best.items():
        assert results["chosen"]["oracle"][suite] == picks
        assert results["chosen"]["best-single"][suite] == picks
        for task, expert in picks.items():
            alone = run_experiment(
                recipe(place, systems=["base", f"single:{expert}"], pool=pool), place / "one"
            )
            (system,) = [s for n, s in alone["suites"][suite]["systems"].items() if n != "base"]
            assert results["suites"][suite]["systems"]["oracle"]["tasks"][task] == system["tasks"][task]


def test_experts_are_chosen_on_rows_that_are_not_measured(place, ready):
    asked = experiment_worker.WorkerState.task
    pool = {"tasks": {"upper": f"jsonl:{place}/upper.jsonl"}, "folder": str(place / "ready")}
    run_experiment(recipe(place, systems=["base"], pool=pool), place / "out")
    run = {"recipe": recipe(place, systems=["base"], pool=pool).to_json(), "out": str(place / "out")}
    lab = experiment_worker.worker_state(run)
    task = asked(lab, "unseen", "held")
    found = experiment_steps.choose(run, "", "upper", "unseen", ["held"])
    files = [json.loads(p.read_text())["key"] for p in (place / "out/scores").glob("*.json")]
    (key,) = [k for k in files if k["split"] == "validation"]
    assert (key["limit"], key["task"]) == (3, task.hash)
    assert not {e.input for e in task.validation} & {e.input for e in task.test[:6]}
    right = lab.scores.score(task, Pool([ready["upper"]]), Single(0), split="validation", limit=3)
    assert found["scores"]["held"][0] == right.mean


def test_rows_that_show_one_raw_row_are_drawn_together():
    """Intervals against `paired_difference` and `suite_interval`, told the groups."""
    draws = random.Random(3)
    groups = tuple(sorted(draws.choices(range(9), k=40)))
    luck = [draws.random() for _ in range(9)]

    def score(skill):
        right = [luck[g] < skill for g in groups]  # rows of one raw row stand or fall together
        made = tuple(Prediction(r, "a") for r in right)
        return TaskScore("t", "test", "exact match", sum(right) / 40, 0, 1, 40, "hash", made, groups=groups)

    table = {"base": {"t": score(0.4)}, "phatgoose": {"t": score(0.6)}, "oracle": {"t": score(0.9)}}
    found = suite_results(table, {"t": "hash"})
    points = {s: [[p.points for p in row["t"].predictions]] for s, row in table.items()}
    more = {"groups": [groups], "resamples": RESAMPLES}
    for system in ("phatgoose", "oracle"):
        expected = paired_difference(points[system], points["base"], **more)
        said = found["against"]["base"][system]
        assert (said["difference"], said["low"], said["high"]) == pytest.approx(expected)
        assert said["low"] != pytest.approx(
            paired_difference(points[system], points["base"], resamples=RESAMPLES)[1]
        )
        low, high = suite_interval(points[system], **more)
        assert (found["systems"][system]["low"], found["systems"][system]["high"]) == pytest.approx(
            (low, high)
        )


def test_what_a_system_cannot_do_at_all_is_said_once(place, ready):
    """A pool without gates, and two tasks that PHATGOOSE can't be measured on."""
    write_rows(
        place / "more.jsonl",
        [{"input": f"so {i}?", "target": "no", "choices": ["no", "yes"]} for i in range(40)],
    )
    measure = {
        "suites": ["unseen"], "test_rows": 4, "choice_rows": 0,
        "tasks": {"held": f"jsonl:{place}/held.jsonl", "more": f"jsonl:{place}/more.jsonl"},
    }  # fmt: skip
    bare = [replace(e, gates=None) for e in ready.experts]
    Pool(bare).save(place / "bare")
    pool = {"folder": str(place / "bare")}
    results = run_experiment(
        recipe(place, pool=pool, measure=measure, systems=["base", "phatgoose"]), place / "out"
    )
    assert list(results["failed"]) == ["phatgoose on unseen (all 2 tasks)"]


def test_contamination_is_reported(place):
    words = "a long enough row of very common words that stands on both sides number"
    write_rows(
        place / "upper.jsonl",
        [{"input": f"{words} {i} {'x' * i}", "target": "yes", "split": "train"} for i in range(40)]
        + [
            {"input": f"{s} {i}", "target": "yes", "split": s}
            for s in ("validation", "test")
            for i in range(8)
        ],
    )
    seen = [
        {"input": f"something else {i}", "target": "no", "choices": ["yes", "no"], "split": "test"}
        for i in range(39)
    ]
    write_rows(place / "held.jsonl", [*seen, {**seen[0], "input": f"{words} 7 {'x' * 7}"}])
    measure = {
        "suites": ["unseen"],
        "tasks": {"held": f"jsonl:{place}/held.jsonl"},
        "test_rows": 40,
        "choice_rows": 0,
    }
    results = run_experiment(recipe(place, systems=["base", "phatgoose"], measure=measure), place / "out")
    found = results["suites"]["unseen"]["contamination"]["held"]
    assert results["suites"]["unseen"]["tasks"]["held"]["test_rows"] == 40
    assert len(found["flagged"]) == 1
    assert found["trained"] == ["upper"]
    assert (
        "1 of 40 rows of held share text with training rows, of upper."
        in (place / "out/results.md").read_text()
    )


def test_an_expert_whose_rows_are_gone_costs_no_more_than_its_own(place, ready):
    trained = recipe(place)
    whole = run_experiment(trained, place / "out")
    assert whole["training_rows"] == {"read": ["upper", "choice"], "unread": []}
    (place / "upper.jsonl").unlink()
    pool = {**trained.to_json()["pool"], "folder": str(place / "out" / "pool")}
    found = run_experiment(recipe(place, pool=pool, systems=["base", "phatgoose"]), place / "again")
    assert found["training_rows"] == {"read": ["choice"], "unread": ["upper"]}
    assert list(found["failed"]) == ["in-pool: upper"]
    assert "not looked at: the training rows of upper." in (place / "again/results.md").read_text()


@pytest.mark.slow(3)
def test_a_run_reads_its_data_anew(place):
    made = recipe(place, systems=["base"], measure={"suites": ["in-pool"], "test_rows": 2})
    before = run_experiment(made, place / "out")
    write_rows(place / "upper.jsonl", [{"input": f"UPPER of {i} again:", "target": "yes"} for i in range(60)])
    found, again = (run_experiment(made, place / "out") for _ in range(2))
    hashes = [r["suites"]["in-pool"]["tasks"]["upper"]["hash"] for r in (before, found, again)]
    assert hashes[0] != hashes[1] == hashes[2]


def test_other_peoples_folders_and_impossible_recipes_are_refused(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(StorageError, match="is not an experiment's folder"):
        run_experiment(recipe(place), tmp_path / "mine")
    only_broken = {"tasks": {"gone": f"jsonl:{place}/gone.jsonl"}}
    with pytest.raises(RecipeError, match=r"no expert could be taken or trained.*does not exist"):
        run_experiment(recipe(place, pool=only_broken), place / "out")
    with pytest.raises(TaskError, match="'t0ho' is for models that never saw"):
        recipe(place, pool={"names": ["flan"]}, measure={"suites": ["t0ho"]})


TEMPLATE = """
dataset: {name}
templates:
  one: !Template
    answer_choices: null
    id: one
    jinja: 'Say what goes with {{{{a}}}} in {name}. ||| {{{{b}}}}'
    metadata: !TemplateMetadata {{original_task: true}}
    name: {template}
    reference: ''
"""


@pytest.fixture
def local_t0(tmp_path, monkeypatch):
    """Made-up prompts and rows for every dataset of T0 Held-In and T0's held-out suite,
    as raw and as rendered rows by turns."""
    entries = [*pool_entries("t0-held-in"), *named_suite("t0ho").entries]
    for place in ("rows", "held-out"):
        (tmp_path / place).mkdir()
    for number, one in enumerate(entries):
        spec = split_spec(one.specs[0])
        if spec.source != "prompted":
            continue
        folder = tmp_path / "prompts" / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "templates.yaml").write_text(TEMPLATE.format(name=one.name, template="that one"))
        for name in filter(None, spec.options.get("without", "").split("|")):
            with (folder / "templates.yaml").open("a") as file:
                file.write(
                    TEMPLATE.format(name=one.name, template=f"'{name}'")
                    .split("templates:\n")[1]
                    .replace("one:", f"{hash(name)}:", 1)
                )
        stem = spec.options.get("files", config_name(spec.name))
        rows = [{"a": f"{one.name} {i}", "b": f"word {i % 5}"} for i in range(30)]
        if number % 2:
            rows = [
                {"template": "that_one", "i": i, "prompt": f"{r['a']}?", "completion": r["b"]}
                for i, r in enumerate(rows)
            ]
        held_out = number >= 36
        split = spec.options.get("test", "test") if held_out else "train"
        write_rows(tmp_path / ("held-out" if held_out else "rows") / f"{stem}.{split}.jsonl", rows)
    kinds = datasets.ClassLabel(names=["where", "who", "when"])
    questions = {"text": [f"question {i}" for i in range(30)], "fine_label": [i % 3 for i in range(30)]}
    features = datasets.Features({"text": datasets.Value("string"), "fine_label": kinds})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(questions, features)}).save_to_disk(
        tmp_path / "rows/trec"
    )
    monkeypatch.setenv("PHATGOOSE_PROMPTSOURCE", str(tmp_path / "prompts"))
    read_templates.cache_clear()
    yield {"t0-held-in": str(tmp_path / "rows"), "t0ho": str(tmp_path / "held-out")}
    read_templates.cache_clear()


@pytest.fixture
def paper(tmp_path, make_base, local_t0):
    """paper(only=(), **changes) → the recipe that is shipped, on a tiny T5 and with a step for everything."""

    def make(only=(), **changes):
        shipped = ExperimentRecipe.read(RECIPES / "paper-t0-held-in.toml", local_t0)
        steps = {**COMMON, "steps": 1, "validate_every": 1, "save_every": 0}
        return replace(
            shipped,
            base=write_base(make_base("t5", layers=1), tmp_path / "base"),
            dtype="float32",
            pool=replace(shipped.pool, train_rows=8, only=only),
            measure=replace(shipped.measure, suites=("in-pool", "t0ho"), test_rows=2, choice_rows=1),
            expert=replace(shipped.expert, rank=1, **steps),
            gate=replace(shipped.gate, **steps),
            **changes,
        )

    return make


@pytest.mark.slow(37)
def test_the_papers_recipe_runs_on_a_tiny_t5_from_local_rows(tmp_path, paper):
    """The recipe that is shipped, with all its 36 experts; its other systems and suites are the next test's
    and BIG-bench's own."""
    results = run_experiment(paper(systems=("base", "phatgoose", "merged")), tmp_path / "out")
    assert results["failed"] == {}
    assert len(results["experts"]) == 36
    own, held_out = (results["suites"][s] for s in ("in-pool", "t0ho"))
    assert len(own["common_tasks"]) == 36
    assert own["systems"]["phatgoose"]["tasks"]["wiki_qa"]["rows"] == 2
    assert own["systems"]["phatgoose"]["tasks"]["trec"]["metric"] == "accuracy (rank)"
    assert held_out["common_tasks"] == [
        e.name for e in named_suite("t0ho").entries
    ]  # StoryCloze too, of an own copy
    assert held_out["left_out"] == {}


@pytest.mark.slow(10)
def test_the_papers_systems_run_on_a_tiny_t5(tmp_path, paper):
    """All that the shipped recipe compares, data signatures and choices among experts with it,
    for three of its experts."""
    made = paper(only=("wiki_qa", "quarel", "trec"))
    encoder = make_encoder(tmp_path / "encoder")
    made = replace(made, signature=replace(made.signature, rows=8, texts=8, encoder=str(encoder)))
    results = run_experiment(made, tmp_path / "out")
    assert results["failed"] == {}
    for name in ("in-pool", "t0ho"):
        measured = results["suites"][name]["systems"]
        assert {s for s, found in measured.items() if "mean" in found} == set(made.all_systems)
    assert results["training_rows"] == {"read": ["wiki_qa", "quarel", "trec"], "unread": []}
