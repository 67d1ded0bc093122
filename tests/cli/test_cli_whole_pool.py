"""gate and signature for the experts of a pool: their tasks, what fails, what was done before, and going on."""

from __future__ import annotations

import json
import shutil

import pytest
from cli_fixtures import SMALL

from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.training import gate

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def plain_pool(ready, run, base, tmp_path):
    """A pool of three plain adapters: two that record the task, and one that knows nothing."""
    folder, _ = ready
    for name in ("one", "two", "bare"):
        shutil.copytree(folder / ("two" if name == "bare" else name), tmp_path / name)
        (tmp_path / name / "gates.safetensors").unlink(missing_ok=True)
        record = json.loads((tmp_path / name / "expert.json").read_text())
        record.pop("gates_sha256", None)
        record["provenance"].pop("gate", None)
        record["name"] = name
        if name == "bare":
            record["provenance"].pop("task")
        (tmp_path / name / "expert.json").write_text(json.dumps(record))
    made = run("pool", "create", tmp_path / "pool", *(tmp_path / n for n in ("one", "two", "bare")))
    assert made.code == 0, made.err
    return tmp_path / "pool"


def test_each_expert_gets_the_gates_of_its_own_task(run, plain_pool, task, tmp_path, monkeypatch):
    """The recorded spec has the file's name alone, so it is found in its folder, and elsewhere it isn't."""
    refused = run("gate", "--pool", plain_pool, *SMALL)
    assert refused.code == 1
    assert "no expert of" in refused.err
    assert "bare: no task is recorded with it. Say which with `--task NAME=SPEC`" in refused.err
    assert "one, two: its recorded task 'jsonl:colour.jsonl' can't be loaded here" in refused.err
    path = task.removeprefix("jsonl:")
    monkeypatch.chdir(path.rpartition("/")[0])
    found = run("gate", "--pool", plain_pool, *SMALL)
    assert found.code == 1  # of the third nothing is known
    assert "1 of 3 experts" in found.err
    assert "2: one, two" in found.out
    pool = Pool.load(plain_pool)
    assert [e.gates is not None for e in pool.experts] == [True, True, False]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.toml").write_text(f'bare = "{task}"')
    before = [e.gates for e in pool.experts[:2]]
    last = run("gate", "--pool", plain_pool, "--missing", "--task", "tasks.toml", *SMALL)
    assert last.code == 0, last.err
    assert "1: bare" in last.out
    pool = Pool.load(plain_pool)
    assert pool.experts[2].gates is not None
    assert all(a[k].equal(b.gates[k]) for a, b in zip(before, pool.experts, strict=False) for k in a)
    again = run("gate", "--pool", plain_pool, "--task", task, "--task", f"bare={task}", *SMALL)
    assert again.code == 0, again.err
    assert "3 were finished before" in again.out
    other = run("gate", "--pool", plain_pool, "one", "--task", task, *SMALL, "--seed", 5)
    assert (other.code, "it has other gates already" in other.err) == (1, True)
    assert run("gate", "--pool", plain_pool, "--missing").out.endswith("every expert has gates.\n")


def test_one_that_fails_costs_no_other_and_a_stopped_run_goes_on(
    run, plain_pool, task, base, tmp_path, monkeypatch
):
    real, asked = gate.train_gate, []

    def train(model, expert, *arguments, **settings):
        asked.append(expert.name)
        if expert.name == "two" and len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, expert, *arguments, **settings)

    monkeypatch.setattr(gate, "train_gate", train)
    options = ("gate", "--pool", plain_pool, "--task", task, *SMALL)
    stopped = run(*options)
    assert (stopped.code, "run the same command again" in stopped.err) == (130, True)
    assert [e.gates is not None for e in Pool.load(plain_pool).experts] == [True, False, False]
    assert run(*options).code == 0
    assert asked == ["one", "two", "two", "bare"]
    assert not (tmp_path / "pool.work").exists()
    alone = run("gate", tmp_path / "two", "--task", task, "--base", base, *SMALL)
    assert alone.code == 0, alone.err
    mine, its = Expert.load(tmp_path / "two").gates, Pool.load(plain_pool)["two"].gates
    assert all(mine[path].equal(its[path]) for path in mine)  # the same gates as by itself


def test_signatures_of_a_pool(run, plain_pool, task):
    found = run("signature", "--pool", plain_pool, "one", "two", "--task", task, "--texts", 0, "--rows", 4)
    assert found.code == 0, found.err
    assert [e.signature is not None for e in Pool.load(plain_pool).experts] == [True, True, False]
    assert run("pool", "verify", plain_pool).code == 0
    again = run("signature", "--pool", plain_pool, "--missing", "--task", task, "--texts", 0, "--rows", 4)
    assert (again.code, "1: bare" in again.out) == (0, True)


def test_what_else_is_in_the_work_folder_stays(run, plain_pool, task, tmp_path, monkeypatch):
    """The adapters that the pool was made of lie there, under the experts' names; the pool is the current folder."""
    monkeypatch.chdir(plain_pool)
    before = {path for path in tmp_path.glob("*/*") if path.parent != plain_pool}
    found = run("gate", "--pool", ".", "bare", "--task", task, "--work", tmp_path, *SMALL)
    assert found.code == 0, found.err
    assert before == {path for path in tmp_path.glob("*/*") if path.parent != plain_pool}
    found = run("gate", "--pool", ".", "one", "--task", task, *SMALL)
    assert found.code == 0, found.err
    assert not (tmp_path / "pool.work").exists()


def test_what_cannot_be_meant(run, plain_pool, task, tmp_path):
    (tmp_path / "dots.toml").write_text(f'one.v2 = "{task}"')
    for words, code, said in (
        (("--pool", plain_pool, "--task", f"ones={task}"), 1, "did you mean 'one'"),
        (("--pool", plain_pool, "--task", task, "--task", "bbh:x"), 2, "are both for all experts"),
        (("--pool", plain_pool, "--task", tmp_path / "dots.toml"), 1, "a name with dots is quoted"),
        (("--pool", plain_pool, "twos", "--task", task), 1, "did you mean 'two'"),
        (("--task", task), 2, "give one expert's folder, or --pool"),
        (("--pool", plain_pool, "--out", "elsewhere", "--task", task), 2, "written into the pool"),
        (("--pool", "bigbench-t0", "--task", task), 1, "comes with phatgoose"),
    ):
        found = run("gate", *words)
        assert (found.code, said in " ".join(found.err.replace("│", "").split())) == (code, True), found.err
    assert run("pool", "pack", plain_pool).code == 0
    packed = run("gate", "--pool", plain_pool, "--task", task)
    assert (packed.code, "phatgoose pool unpack" in packed.err) == (1, True)
