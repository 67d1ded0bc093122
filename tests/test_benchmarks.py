"""benchmarks/: every name that a script imports from the package is there,
and the scripts that need no download run."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from phatgoose.experts.pool import Pool
from phatgoose.records import Prediction, Task, TaskScore

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Imports one of the scripts, which import each other by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").is_file():
            del sys.modules[name]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_name_that_a_script_uses_is_there(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "phatgoose":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                modules[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = modules.get(node.value.id)
            if type(found) is type(sys):
                assert hasattr(found, node.attr), f"{node.value.id} has no {node.attr}"


def test_one_of_the_methods_is_the_one_that_is_chosen(scripts):
    import torch

    layers, ops = scripts("bench_layers"), scripts("ops")
    case = layers.Case(64, 48, 4, 8, torch.bfloat16)
    with torch.inference_mode():
        row = ops._row(case, layers.layers_of(case)[:2], 3)
    assert row.split()[:3] == ["4", "32", "3"]
    assert row.count("*") == 1


def test_pools_that_are_written_to_be_measured_can_be_loaded(scripts, tmp_path):
    scripts("packed").write_pool(tmp_path / "folders", 2, 1)
    small = SimpleNamespace(layers=1, experts=2, rank=2, modules=["q_proj"])
    scripts("large").write(tmp_path / "packed", small)
    for name in ("folders", "packed"):
        pool = Pool.load(tmp_path / name)
        assert len(pool) == 2
        assert pool.base is not None


def test_gander_is_measured_beside_the_base_and_phatgoose(scripts, tmp_path, capsys):
    scripts("many").main(["--smoke", "--out", str(tmp_path / "many.json")])
    assert "30 experts of rank 2" in capsys.readouterr().out
    sizes = json.loads((tmp_path / "many.json").read_text(encoding="utf-8"))["sizes"]
    assert [one["experts"] for one in sizes] == [5, 30]
    for one in sizes:
        assert one["open"]["gander"]["seconds"].keys() > {"whitening", "statistics", "with_passes"}
        assert one["state_bytes_of_a_sequence"] == 4 * 256 * (one["experts"] + 2)
        assert [step["ratio"].keys() for step in one["steps"]] == [{"gander", "cpu"}] * 3
        assert all(step["floors"]["gander"]["byte_floor"] > 1 for step in one["steps"])


def test_the_results_without_gates_have_the_form_of_the_published_ones(scripts):
    ungated = scripts("ungated")
    published = json.loads((BENCHMARKS / "results" / "ungated-2026-11-22.json").read_text(encoding="utf-8"))
    listed = [ungated.System(name, "", None, None) for name in ("base", ungated.TRUE, "weights")]
    tasks = {"in-pool": [Task("a", (), (), ())], "unseen": [Task("b", (), (), ())]}
    rights = {"base": (0, 0, 0, 0), ungated.TRUE: (1, 1, 1, 0), "weights": (1, 1, 1, 1)}
    predictions = {name: tuple(Prediction(bool(r), "") for r in right) for name, right in rights.items()}
    table = {
        name: {
            task: TaskScore(task, "test", "", sum(rights[name]) / 4, 0, 1, 4, predictions=predictions[name])
            for task in "ab"
        }
        for name in rights
    }
    base = SimpleNamespace(
        spec="x", model=SimpleNamespace(dtype="bfloat16"), fingerprint=SimpleNamespace(to_json=dict)
    )
    found = ungated.results(base, SimpleNamespace(experts=()), tasks, listed, table, {})
    assert found.keys() == published.keys()
    assert [s.keys() for s in found["systems"]] == [s.keys() for s in published["systems"][:3]]
    for name in ("minus_true_gates", "minus_base"):
        rows = found[name]["weights"]
        assert [row.keys() for row in rows] == [row.keys() for row in published[name]["weights"]]
        assert [row["group"] for row in rows] == ["in-pool", "unseen"]
    assert found["minus_true_gates"]["weights"][0]["difference"] == 0.25
    assert found["minus_base"].keys() == {ungated.TRUE, "weights"}
    assert found["recovered"].keys() == rights.keys()
