"""The quickstart on a tiny base: what it writes, and that killing it at any moment changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phatgoose.errors import ExpertError, StorageError
from phatgoose.workflows.recipe import Recipe
from phatgoose.workflows.recipes import QUICKSTART, SMOKE

RUN = """
import json, sys
from rich.console import Console
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.workflows.quickstart import run_quickstart
from phatgoose.workflows.recipe import Recipe
import phatgoose.workflows.quickstart as q
q._dtype = lambda: "float32"
folder, out = sys.argv[1:3]
common = dict(rows_per_step=4, rows_per_batch=4, max_length=64, validation_rows=4, validate_every=2, save_every=1, learning_rate=1e-2)
recipe = Recipe(
    base=f"{folder}/base", pool_tasks=(f"jsonl:{folder}/upper.jsonl", f"jsonl:{folder}/choice.jsonl"),
    held_out_tasks=(f"jsonl:{folder}/held.jsonl",), expert=ExpertConfig(rank=2, alpha=4, steps=4, **common),
    gate=GateConfig(steps=3, **common), train_rows=20, test_rows=6, choice_rows=3, shown_prompts=2,
)
run_quickstart(out, recipe=recipe, console=Console(width=150))
"""


@pytest.fixture
def place(tmp_path, make_base):
    base = make_base("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    rows = {
        "upper": [{"input": f"upper of {i}:", "target": "yes"} for i in range(60)],
        "choice": [
            {"input": f"is {i} even?", "target": ("no", "yes")[i % 2 == 0], "choices": ["yes", "no"]}
            for i in range(60)
        ],
        "held": [{"input": f"what is {i}?", "target": str(i)} for i in range(60)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def start(place, out):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(place), str(out)],
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
    stamps = {p: p.stat().st_mtime_ns for p in (out / "experts").glob("*/adapter_model.safetensors")}
    finish(place, out)
    assert outcome(out) == expected
    assert all(
        p.stat().st_mtime_ns == t for p, t in stamps.items()
    )  # finished experts were not trained again
    again = finish(place, out)
    assert outcome(out) == expected
    assert "expert upper: 4/4" not in again
    for part in ("PHATGOOSE", "oracle", "A gate was trained on", "phatgoose chat --pool"):
        assert part in text
    assert re.search(r"in-pool: (PHATGOOSE recovers|the oracle gains too little)", text)
    assert re.search(r"in-pool tasks: accuracy on 6 test rows each", text)


@pytest.mark.slow(44)
def test_results_are_complete_and_consistent(place):
    finish(place, place / "out")
    results = json.loads((place / "out/results.json").read_text())
    names = [s["name"] for s in results["systems"]]
    assert names == [
        "base",
        "single: upper",
        "single: choice",
        "merged",
        "uniform",
        "random",
        "PHATGOOSE",
        "oracle",
    ]
    by_name = {s["name"]: s for s in results["systems"]}
    for task in results["tasks"]:
        singles = [by_name[n]["scores"][task["name"]]["mean"] for n in names if n.startswith("single")]
        assert by_name["oracle"]["scores"][task["name"]]["mean"] in singles
        assert (
            by_name["merged"]["scores"][task["name"]]["mean"]
            == by_name["uniform"]["scores"][task["name"]]["mean"]
        )
        assert sum(results["shares"][task["name"]].values()) == pytest.approx(1, abs=1e-2)
    assert (place / "out/quickstart.html").stat().st_size > 10_000
    (place / "out/experts/upper/adapter_model.safetensors").write_bytes(b"damaged")
    process = start(place, place / "out")
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "adapter_model.safetensors is not a whole safetensors file" in text
    assert ExpertError.__name__ in text


def test_other_peoples_folders_are_refused(tmp_path):
    from phatgoose.workflows.quickstart import run_quickstart

    (tmp_path / "letter.txt").write_text("dear")
    for fresh in (False, True):
        with pytest.raises(StorageError, match="is not a quickstart's folder"):
            run_quickstart(
                tmp_path, fresh=fresh, recipe=Recipe(base="none", pool_tasks=(), held_out_tasks=())
            )
    assert (tmp_path / "letter.txt").exists()


def test_recipes_keep_their_promises():
    assert len(QUICKSTART.pool_tasks) >= 5
    assert len(QUICKSTART.held_out_tasks) >= 5
    assert not set(QUICKSTART.pool_tasks) & set(QUICKSTART.held_out_tasks)
    assert QUICKSTART.test_rows == 100
    assert len(SMOKE.pool_tasks) == 2
    assert SMOKE.base == QUICKSTART.base


def test_what_to_type_next_is_small_and_can_be_typed(monkeypatch, tmp_path):
    """Not the paper's training, which takes days on a laptop, and with what puts phatgoose on the path where it isn't."""
    from io import StringIO

    from rich.console import Console

    from phatgoose.workflows import show
    from phatgoose.workflows.recipes import QUICKSTART

    def said(found):
        monkeypatch.setattr(show.shutil, "which", lambda _: found)
        text = StringIO()
        show.next_steps(Console(file=text, width=1000), tmp_path, QUICKSTART, tmp_path / "page.html", None)
        return text.getvalue()

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    monkeypatch.setattr(show.sys, "prefix", str(tmp_path))
    assert f". {tmp_path}/bin/activate" in said(None)
    assert "activate" not in said("/usr/bin/phatgoose")
    assert "--out my-expert --steps 60 --rows-per-step 16" in said(None)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert show.SMALL in " ".join(readme.replace("\\\n", " ").split())
