"""`pool list` and `pool verify` name an expert that is wildly off, and print nothing of strangers'
that a terminal would obey."""

from __future__ import annotations

import pytest

from conftest import write_base
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json, write_json

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def pool(make_base, make_expert, tmp_path):
    base = make_base("llama")
    experts = [make_expert(base, name, rank=2, seed=i) for i, name in enumerate("abc")]
    wild = {**experts[0].adapter_config, "lora_alpha": 8000}
    provenance = {**experts[0].provenance, "task": {"name": "evil\x1b]0;owned\x07[bold]\nnext"}}
    experts[0] = Expert("a", wild, experts[0].tensors, experts[0].gates, provenance)
    return base, Pool(experts).save(tmp_path / "pool")


def test_an_expert_that_is_an_outlier_is_named(run, pool, tmp_path):
    base, folder = pool
    for command in ("list", "verify"):
        found = run("pool", command, folder)
        assert found.code == 0, found.err
        assert "warning: a: its update's norm is " in found.err
        assert "b: " not in found.err
    write_base(base, tmp_path / "base")
    found = run("pool", "verify", folder, "--base", tmp_path / "base", "--dtype", "float32")
    assert found.code == 0, found.err
    assert "times the base's own weight's at model.layers." in found.err


def test_text_of_strangers_is_only_shown(run, pool):
    _, folder = pool
    found = run("pool", "list", folder)
    assert r"evil\x1b]0;owned\x07[bold] next" in found.out
    assert "\x1b" not in found.out
    manifest = read_json(folder / "pool.json", ValueError)
    manifest["experts"][0]["folder"] = "\x1b[2Jgone"
    write_json(folder / "pool.json", manifest)
    found = run("pool", "list", folder)
    assert found.code == 1
    assert "\x1b" not in found.err
    assert r"lies in '\x1b[2Jgone'" in found.err
