"""What the command-line tests run on: a tiny base in a folder, a task in a file, and `run`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

SMALL = ["--steps", "2", "--rows-per-step", "4", "--rows-per-batch", "2", "--max-length", "64"]
SMALL += ["--validate-every", "1", "--learning-rate", "0.05"]


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def run():
    """run("pool", "list", folder, input="") → Result, in this process."""
    from phatgoose.cli.main import app

    def run(*arguments, input: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def save_base(tokenizer, tmp_path_factory):
    """save_base("llama", seed=0) → a folder that load_base reads."""
    from conftest import make_model

    def save(family: str, seed: int = 0, chat_template: str | None = None) -> str:
        import copy

        folder = tmp_path_factory.mktemp("bases") / f"tiny-{family}-{seed}"
        make_model(family, seed).save_pretrained(folder)
        own = copy.deepcopy(tokenizer)
        own.chat_template = chat_template
        own.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def base(save_base):
    return save_base("llama")


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A jsonl task with its own splits: 8 training, 4 validation, 5 test rows."""
    path = tmp_path_factory.mktemp("tasks") / "colour.jsonl"
    words = ["red", "blue", "green", "black", "white"]
    rows = []
    for split, count in (("train", 8), ("validation", 4), ("test", 5)):
        for i in range(count):
            prompt = f"{split} {i}: what is the colour of {words[i % 5]} number {i}?\nAnswer:"
            rows.append({"input": prompt, "target": words[i % 5], "split": split})
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{path}"


@pytest.fixture(scope="session")
def ready(run, base, task, tmp_path_factory):
    """A folder with two experts, "one" with gates and "two" without, and the pool of "one" and gated "two",
    made by commands."""
    folder = tmp_path_factory.mktemp("ready")
    out = {}
    common = ["--task", task, "--base", base, *SMALL]
    for name, seed in (("one", 0), ("two", 1)):
        out[name] = run("train", "--out", folder / name, "--name", name, "--seed", seed, "--rank", 2, *common)
    out["gate one"] = run("gate", folder / "one", *common)
    out["gate two"] = run("gate", folder / "two", "--out", folder / "two-gated", *common)
    out["pool"] = run("pool", "create", folder / "pool", folder / "one", folder / "two-gated")
    for name, result in out.items():
        assert result.code == 0, (name, result.err)
    return folder, out


@pytest.fixture
def pool(ready, tmp_path):
    """A copy of the pool, to change."""
    folder, _ = ready
    shutil.copytree(folder / "pool", tmp_path / "pool")
    return tmp_path / "pool"
