"""Experts of other kinds than LoRA, and adapters in AdapterHub's format, on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool

pytest_plugins = ["cli_fixtures"]
SHORT = [
    "--steps",
    "2",
    "--rows-per-step",
    "4",
    "--rows-per-batch",
    "2",
    "--max-length",
    "64",
    "--validate-every",
    "1",
]
SMALL = [*SHORT, "--learning-rate", "0.05"]
DATA = Path(__file__).parent.parent / "data" / "adapterhub"


@pytest.mark.slow(10)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kind", "ia3"], "(IA)³, 6 modules"),
        (["--kind", "bottleneck", "--reduction", 8], "bottleneck of rank 4, 2 modules"),
        (["--rank", 3, "--dora", "--target-modules", "v_proj"], "DoRA of rank 3, 2 modules"),
    ],
)
def test_train_gate_pool_generate(run, base, task, tmp_path, options, words):
    common = ["--task", task, "--base", base, *SMALL]
    trained = run("train", "--out", tmp_path / "one", *common, *options)
    assert trained.code == 0, trained.err
    assert f"one: {words}" in trained.out
    again = run("train", "--out", tmp_path / "one", *common, *options)
    assert "finished before" in again.out
    gated = run("gate", tmp_path / "one", *common)
    assert gated.code == 0, gated.err
    made = run("pool", "create", tmp_path / "pool", tmp_path / "one")
    assert made.code == 0, made.err
    listed = run("pool", "list", tmp_path / "pool")
    assert listed.code == 0, listed.err
    checked = run("pool", "verify", tmp_path / "pool", "--base", base)
    assert checked.code == 0, checked.err
    answered = run("generate", "--pool", tmp_path / "pool", "--base", base, "--max-new-tokens", 2, "red")
    assert answered.code == 0, answered.err


@pytest.mark.slow(3)
def test_the_kinds_own_learning_rate_and_settings_of_others(run, base, task, tmp_path):
    trained = run("train", "--out", tmp_path / "one", "--task", task, "--base", base, "--kind", "ia3", *SHORT)
    assert trained.code == 0, trained.err
    assert Expert.load(tmp_path / "one").provenance["config"]["learning_rate"] == 3e-3
    assert "--learning-rate 0.003" in trained.out  # its gates are trained with the same
    refused = run("train", "--out", tmp_path / "two", "--task", task, "--kind", "ia3", "--rank", 4)
    assert refused.code == 1
    assert "rank = 4" in refused.err
    assert "kind='ia3'" in refused.err


def test_pools_take_adapters_of_both_formats_by_their_config(run, tmp_path):
    made = run("pool", "create", tmp_path / "pool", DATA / "llama" / "houlsby")
    assert made.code == 0, made.err
    added = run("pool", "add", tmp_path / "pool", DATA / "llama" / "parallel", "--name", "beside")
    assert added.code == 0, added.err
    assert Pool.load(tmp_path / "pool").names == ("houlsby", "beside")
    headed = run("pool", "add", tmp_path / "pool", DATA / "llama" / "pfeiffer")
    assert headed.code == 1
    assert "prediction head" in headed.err
    dropped = run("pool", "add", tmp_path / "pool", DATA / "llama" / "pfeiffer", "--drop", "prediction_head")
    assert dropped.code == 0, dropped.err
    checked = run("pool", "verify", tmp_path / "pool", "--base", DATA / "llama")
    assert checked.code == 0 or "tokenizer" in checked.err
    listed = run("pool", "list", tmp_path / "pool")
    assert listed.code == 0, listed.err
    assert "beside" in listed.out
