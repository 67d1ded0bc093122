"""What is wrong is said in one line, with exit code 1 (2 for wrong usage), and nothing is damaged."""

from __future__ import annotations

import json
import shutil

import pytest
from cli_fixtures import SMALL

from phatgoose.cli.common import folders
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool

pytest_plugins = ["cli_fixtures"]


def refused(result, *words, code=1):
    assert result.code == code, (result.out, result.err)
    for word in words:
        assert word in result.err, result.err
    assert "Traceback" not in result.err
    if code == 1:
        assert result.err.splitlines()[-1].startswith("error: ")


def flip(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_wrong_base(run, pool, save_base, task, tmp_path):
    other = save_base("llama", 3)
    for command in (
        ["generate", "red", "--pool", pool, "--base", other],
        ["eval", "--task", task, "--pool", pool, "--base", other, "--out", tmp_path / "s.json"],
        ["pool", "verify", pool, "--base", other],
        ["gate", pool.parent / "copy", "--task", task, "--base", other, *SMALL],
    ):
        if command[0] == "gate":
            Pool.load(pool)["one"].save(pool.parent / "copy")
            command += ["--overwrite"]
        refused(run(*command), "base")
    assert not (tmp_path / "s.json").exists()
    assert Expert.load(pool.parent / "copy").gates is not None


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "gates.safetensors", "adapter_config.json"])
def test_damaged_files(run, pool, base, file):
    path = pool / "experts" / "two" / file
    flip(path)
    refused(run("pool", "verify", pool), str(path), "sha256")
    refused(run("generate", "red", "--pool", pool, "--base", base), str(path))
    fixed = run("pool", "remove", pool, "two")
    assert fixed.code == 0, fixed.err
    assert run("pool", "verify", pool).code == 0


def test_truncated_adapter(run, ready, task, base, tmp_path):
    folder, _ = ready
    shutil.copytree(folder / "two", tmp_path / "two")
    weights = tmp_path / "two" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(run("gate", tmp_path / "two", "--task", task, "--base", base, *SMALL), str(weights))
    refused(run("pool", "create", tmp_path / "pool", tmp_path / "two"), str(weights))
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ("phatgose", ["unknown router", "did you mean 'phatgoose'"]),
        ("single:on", ["unknown expert", "did you mean 'one'"]),
        ("phatgoose:k=3", ["no setting 'k'", "top_k"]),
        ("random:seed=x", ["whole number"]),
        ("merged:x=1", ["merged has no setting 'x'; it has: none"]),
        ("ties:density=7", ["density is a share"]),
    ],
)
def test_routers(run, pool, base, task, router, words):
    refused(run("generate", "red", "--base", base, "--pool", pool, "--router", router), *words)
    refused(run("eval", "--task", task, "--base", base, "--pool", pool, "--router", router), *words)


def test_a_router_without_a_pool(run, base):
    refused(run("generate", "red", "--base", base, "--router", "uniform"), "--pool")


def test_unknown_backend_and_dtype(run, pool, base):
    refused(
        run("generate", "red", "--base", base, "--pool", pool, "--backend", "tosch"), "did you mean 'torch'"
    )
    refused(run("generate", "red", "--base", base, "--dtype", "bfloat"), "did you mean 'bfloat16'")


def test_missing_gates(run, ready, base, task, tmp_path):
    folder, _ = ready
    made = run("pool", "create", tmp_path / "pool", folder / "two")
    assert made.code == 0
    assert any(line.split() == ["gates", "none"] for line in made.out.splitlines())
    out = tmp_path / "s.json"
    options = ["--base", base, "--pool", tmp_path / "pool"]
    refused(
        run("eval", "--task", task, *options, "--router", "base", "--router", "phatgoose", "--out", out),
        "has no gates",
        "phatgoose gate",
    )
    assert not out.exists()  # refused before the base was measured
    assert run("generate", "red", *options, "--router", "single:two", "--max-new-tokens", 2).code == 0


def test_tasks(run, base, tmp_path):
    out = tmp_path / "e"
    refused(run("train", "--task", "jsnl:x", "--out", out, "--base", base), "did you mean 'jsonl'")
    refused(run("train", "--task", "jsonl:missing.jsonl", "--out", out, "--base", base), "missing.jsonl")
    refused(run("eval", "--task", "nothing", "--base", base), "source:name")
    assert not out.exists()


def test_settings(run, base, task, tmp_path):
    start = ["train", "--task", task, "--base", base, "--out", tmp_path / "e"]
    refused(run(*start, "--rank", 0), "ExpertConfig.rank")
    refused(run(*start, "--rows-per-step", 5, "--rows-per-batch", 2), "divisor")
    refused(run(*start, "--precision", "float8"), code=2)
    refused(run(*start, "--rank", "two"), code=2)
    refused(run(*start, "--rnk", 2), code=2)
    refused(run(*start[:-1]), code=2)


def test_missing_folders(run, task, base, tmp_path):
    missing = tmp_path / "missing"
    refused(run("gate", missing, "--task", task, "--base", base), str(missing))
    refused(run("pool", "list", missing), str(missing))
    refused(run("pool", "verify", missing), str(missing))
    refused(run("pool", "remove", missing, "one"), str(missing))
    refused(run("pool", "create", tmp_path / "pool", missing), str(missing))
    refused(run("generate", "red", "--base", missing), str(missing))
    refused(run("generate", "red", "--base", base, "--pool", missing), str(missing))
    assert not missing.exists()
    assert not (tmp_path / "missing.work").exists()


def test_pools(run, ready, pool):
    folder, _ = ready
    refused(run("pool", "create", pool, folder / "one"), "pool add")
    refused(run("pool", "add", folder / "nowhere", folder / "one"), "pool create")
    assert not (folder / "nowhere").exists()
    refused(run("pool", "add", pool, folder / "one"), "'one'")
    refused(run("pool", "add", pool, folder / "one", folder / "two", "--name", "x"), code=2)
    refused(run("pool", "remove", pool, "one", "tow"), "did you mean 'two'")
    refused(run("pool", "create", folder / "one", folder / "two"), "something else")
    assert Pool.load(pool).names == ("one", "two")


def test_an_expert_is_not_written_over_other_things(run, ready, pool, base, task, tmp_path):
    folder, _ = ready
    options = ["--task", task, "--base", base, *SMALL]
    shutil.copytree(folder / "two", tmp_path / "two")
    (tmp_path / "two" / "notes.txt").write_text("mine")
    refused(run("gate", tmp_path / "two", *options), "notes.txt", "--out")
    refused(run("gate", pool / "experts" / "one", *options, "--overwrite"), "pool remove")
    (tmp_path / "file").write_text("x")
    refused(run("train", "--out", tmp_path / "file", *options), "is a file")
    refused(run("train", "--out", tmp_path, *options, "--overwrite"), "no expert's")
    refused(run("gate", folder / "two", "--out", folder / "one", *options), "--overwrite")
    refused(run("gate", folder / "one", *options, "--seed", 9), "--overwrite")
    assert (tmp_path / "two" / "notes.txt").read_text() == "mine"
    (tmp_path / "two" / "notes.txt").rename(tmp_path / "two" / "README.md")
    refused(run("train", "--out", tmp_path / "two", *options, "--overwrite"), "README.md", "--out")
    assert run("gate", tmp_path / "two", *options).code == 0
    assert (tmp_path / "two" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("command", ["train", "gate", "signature"])
def test_a_second_run_of_a_command_is_refused(run, ready, task, tmp_path, command):
    """Before it does anything; what the first holds is given back with its process."""
    target = Expert.load(ready[0] / "two").save(tmp_path / "e")
    words = [command, "--out", target] if command == "train" else [command, target]
    with folders.only_run(target, command, tmp_path / "w"):
        refused(run(*words, "--task", task, "--base", "nowhere"), "another run is at work in", str(target))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e"]


@pytest.mark.parametrize(("local", "first"), [(None, True), ("0", False)])
def test_a_rank_alone_makes_no_process_one_of_several(tmp_path, monkeypatch, local, first):
    """A cluster may set RANK for a machine that trains by itself: it locks its folder, and leaves no work behind."""
    monkeypatch.setenv("RANK", "1")
    if local is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local)
    work = tmp_path / "w"
    (work / "adapter").mkdir(parents=True)
    with folders.only_run(tmp_path / "e", "train", work):
        assert (tmp_path / ".e.train.lock").exists() is first
    assert work.exists() is not first


def test_gates_keep_the_files_permissions(run, ready, base, task, tmp_path):
    target = Expert.load(ready[0] / "two").save(tmp_path / "e")
    for path in target.iterdir():
        path.chmod(0o600)
    assert run("gate", target, "--task", task, "--base", base, *SMALL).code == 0
    assert run("pool", "create", tmp_path / "pool", target).code == 0
    for folder in (target, tmp_path / "pool" / "experts" / "two"):
        modes = {p.name: oct(p.stat().st_mode & 0o777) for p in folder.iterdir()}
        assert "gates.safetensors" in modes
        assert set(modes.values()) == {"0o600"}


def test_no_recorded_base(run, ready, task, tmp_path):
    folder, _ = ready
    shutil.copytree(folder / "two", tmp_path / "plain")
    (tmp_path / "plain" / "expert.json").unlink()
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    refused(run("gate", tmp_path / "plain", "--task", task, *SMALL), "--base")


def test_chat_template_missing(run, base):
    refused(run("generate", "red", "--chat", "--base", base), "--raw")
    refused(run("chat", "--chat", "--base", base, input="red\n"), "--raw")


def test_empty_prompt(run, base):
    refused(run("generate", "-", "--base", base, input="\n"), code=2)


def test_limits(run, base, task):
    refused(run("eval", "--task", task, "--base", base, "--limit", 0), code=2)
    refused(run("eval", "--task", task, "--base", base, "--split", "tset"), code=2)


def test_a_path_that_the_system_refuses(run, pool, base, task, tmp_path):
    long = tmp_path / ("n" * 300)
    for command in (
        ["pool", "list", long],
        ["pool", "create", long, pool / "experts" / "one"],
        ["generate", "red", "--pool", long],
        ["train", "--task", task, "--base", base, "--out", long, *SMALL],
        ["report", "--pool", pool, "--base", base, "--prompt", "red", "--out", long],
    ):
        refused(run(*command), str(long), "File name too long")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool"]
