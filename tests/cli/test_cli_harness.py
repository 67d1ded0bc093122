"""`phatgoose eval --harness`: the harness's scores of the base and of a pool, what it keeps, what it refuses."""

from __future__ import annotations

import json
import math

import pytest

from harness_fixtures import ROWS, harness_choices, harness_task
from phatgoose.cli.measure.eval import _plain, table
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.load import load_base
from phatgoose.records import Task
from phatgoose.routers import PHATGOOSE

pytest_plugins = ["cli_fixtures"]
pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'phatgoose[harness]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A task file as the harness reads it: YAML, of which JSON is a part."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")
    config = harness_task(Task("toy", (), (), ROWS), tmp_path / "rows")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(json.dumps(config))
    return tmp_path / "tasks"


@pytest.mark.slow(42)
def test_it_says_what_the_harness_measures(run, ready, base, folder, tmp_path):
    (made, _), out = ready, tmp_path / "out.json"
    shown = run(
        "eval", "--base", base, "--pool", made / "pool", "--router", "phatgoose", "--router", "base",
        "--harness", "phatgoose_toy", "--harness-folder", folder, "--limit", 9, "--out", out,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    model, gold = load_base(base), [row.choices.index(row.targets[0]) for row in ROWS[:9]]
    expected = {"base": harness_choices(model, ROWS[:9])}
    route(model, Pool.load(made / "pool"), PHATGOOSE())
    expected["phatgoose"] = harness_choices(model, ROWS[:9])
    unroute(model)
    kept = json.loads(out.read_text())["results"]
    for name, choices in expected.items():
        right = sum(c.acc == g for c, g in zip(choices, gold, strict=True)) / 9
        assert kept[name]["harness"]["results"]["phatgoose_toy"]["acc,none"] == pytest.approx(right)
        assert len(kept[name]["harness"]["samples"]["phatgoose_toy"]) == 9
        assert f"{right:.4f}" in shown.out


def test_options_that_would_do_nothing_are_refused(run, base):
    for option in (("--split", "validation"), ("--batch-tokens", 64)):
        shown = run("eval", "--base", base, "--harness", "phatgoose_toy", *option)
        assert shown.code == 1
        assert "--split and --batch-tokens are for --task" in " ".join(shown.err.split())
    shown = run("eval", "--base", base, "--harness", "")
    assert shown.code == 1
    assert "lm-evaluation-harness knows no task" in " ".join(shown.err.split())
    shown = run("eval", "--base", base, "--task", "bigbench:hyperbaton", "--harness-folder", ".")
    assert shown.code == 1
    assert "--harness-folder is for --harness" in " ".join(shown.err.split())


def test_the_table_has_every_routers_metrics():
    found = {
        "base": {"t": {"alias": "t", "ppl,none": math.inf, "ppl_stderr,none": 1.0, "acc,none": 0.5}},
        "phatgoose": {"t": {"ppl,none": 20.5, "more,none": 1.0}},
    }
    assert table(found) == [
        ("t", "ppl,none", "inf", "20.5000"),
        ("t", "acc,none", "0.5000", ""),
        ("t", "more,none", "", "1.0000"),
    ]


def test_what_json_cannot_hold_is_written_out():
    """An infinite perplexity is a result too, and no reason to lose the others."""
    found = _plain({"a": [math.inf, -math.inf, math.nan, 0.5], "f": math.exp})
    assert found["a"] == ["inf", "-inf", "nan", 0.5]
    json.dumps(found, allow_nan=False)
