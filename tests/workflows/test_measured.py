"""Scores that are kept: found again for what they were made of, and for nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phatgoose.files import read_json
from phatgoose.records import Example, Task
from phatgoose.workflows.experiment import scores as measured
from phatgoose.workflows.experiment.scores import ScoreCache, code_version


@pytest.fixture
def task():
    rows = tuple(Example(f"is {i} even?", ("yes",), ("yes", "no")) for i in range(4))
    return Task("even", (), (), rows)


def test_another_code_torch_or_transformers_measures_again(make_base, task, tmp_path, monkeypatch):
    kept = ScoreCache(make_base("llama"), tmp_path)
    path = kept.measure(task, None, None, limit=4)
    assert kept.measure(task, None, None, limit=4) == path
    made = read_json(path, ValueError)["made"]
    assert made["threads"] == torch.get_num_threads()
    assert made["seconds"] >= 0
    monkeypatch.setattr(measured, "code_version", lambda: "another")
    other = kept.measure(task, None, None, limit=4)
    monkeypatch.setattr(torch, "__version__", "0.1")
    third = kept.measure(task, None, None, limit=4)
    monkeypatch.setattr(measured, "version", lambda package: "0.2")
    assert len({path, other, third, kept.measure(task, None, None, limit=4)}) == 4


def test_raw_rows_are_told_apart_though_the_task_is_the_same(make_base, task, tmp_path):
    kept = ScoreCache(make_base("llama"), tmp_path)
    grouped = replace(task, test=tuple(replace(e, group="one") for e in task.test))
    scores = [kept.score(t, None, None, limit=4) for t in (task, grouped)]
    assert [s.raw_rows for s in scores] == [4, 1]


def test_the_codes_version_follows_what_decides_scores(tmp_path, monkeypatch):
    for folder in ("evaluation", "experts", "models", "ops/cpu/kernel", "routers", "tasks"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("__init__.py", "records.py", "ops/cpu/kernel/update.cpp"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(measured.phatgoose, "__file__", str(tmp_path / "__init__.py"))
    seen = []
    for name in ("records.py", "ops/cpu/kernel/update.cpp", "__init__.py"):
        (tmp_path / name).write_text("2")
        code_version.cache_clear()
        seen.append(code_version())
    code_version.cache_clear()
    assert seen[0] != seen[1] == seen[2]
