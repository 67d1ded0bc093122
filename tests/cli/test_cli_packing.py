"""`phatgoose pool pack` and `unpack`, and the other commands on a packed pool."""

from __future__ import annotations

import pytest

from conftest import files_of

pytest_plugins = ["cli_fixtures"]


@pytest.mark.slow(3)
def test_pack_use_and_unpack(run, pool, ready, base):
    folder, _ = ready
    before = files_of(pool)
    expected = run("generate", "red", "--pool", pool, "--base", base)
    listed = run("pool", "list", pool)
    packed = run("pool", "pack", pool)
    assert packed.code == 0, packed.err
    assert "2 experts in stacks-1.safetensors" in packed.out
    assert not (pool / "experts/one/adapter_model.safetensors").exists()
    verified = run("pool", "verify", pool, "--base", base)
    assert verified.code == 0, verified.err
    assert "2 experts, every file as the manifest says" in verified.out
    assert "copied" not in verified.err
    assert run("generate", "red", "--pool", pool, "--base", base).out == expected.out
    assert run("pool", "list", pool).out == listed.out
    narrow = run("generate", "red", "--pool", pool, "--base", base, "--dtype", "bfloat16")
    assert narrow.code == 0, narrow.err
    assert "at 14 of 14 modules the packed rows are copied into memory" in narrow.err
    added = run("pool", "add", pool, folder / "one", "--name", "three")
    assert added.code == 0, added.err
    assert run("pool", "remove", pool, "three").code == 0
    assert run("pool", "pack", pool, "--spare", "0").code == 0
    unpacked = run("pool", "unpack", pool)
    assert unpacked.code == 0, unpacked.err
    assert "2 experts, each in its folder" in unpacked.out
    after = files_of(pool)
    assert {k: v for k, v in after.items() if k != "README.md"} == {
        k: v for k, v in before.items() if k != "README.md"
    }


def test_refusals(run, pool):
    again = run("pool", "unpack", pool)
    assert (again.code, "is not packed" in again.err) == (1, True)
    assert run("pool", "pack", pool, "--spare", "-1").code == 1
    assert run("pool", "pack", pool).code == 0
    (stacks,) = (pool / "packed").iterdir()
    data = bytearray(stacks.read_bytes())
    data[int.from_bytes(data[:8], "little") + 8] ^= 1
    stacks.write_bytes(data)
    for command in ("verify", "unpack", "pack"):
        result = run("pool", command, pool)
        assert (result.code, "the rows of one are damaged" in result.err) == (1, True), result.err


@pytest.mark.slow(3)
def test_device_memory(run, pool, base, task, tmp_path):
    import json

    settings = ("--pool", pool, "--base", base)
    expected = run("generate", "red", *settings, "--router", "phatgoose")
    found = run("generate", "red", *settings, "--device-memory", "60kB")
    assert found.code == 0, found.err
    assert found.out == expected.out
    assert "MB for experts used last" in found.err
    scores = ("eval", "--task", task, *settings, "--limit", "3", "--router", "phatgoose", "--router", "base")
    assert run(*scores, "--device-memory", "1GB", "--out", tmp_path / "scores.json").code == 0
    results = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert results["phatgoose"]["device_memory"]["budget_bytes"] == 10**9
    assert results["phatgoose"]["device_memory"]["experts"]["misses"] > 0
    assert "device_memory" not in results["base"]
    for given, message in (
        (("--device-memory", "lots"), "device_memory is 'lots'"),
        (("--device-memory", "5"), "at least"),
        (("--device-memory", "1GB", "--router", "uniform"), "Uniform doesn't choose by gates"),
    ):
        refused = run("generate", "red", *settings, *given)
        assert (refused.code, message in refused.err) == (1, True), refused.err
    alone = run("generate", "red", "--base", base, "--device-memory", "1GB")
    assert (alone.code, "give --pool" in alone.err) == (1, True)
