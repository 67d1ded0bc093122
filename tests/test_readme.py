"""The README's commands run, on a tiny base and with few steps in place of the real ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

from typer.testing import CliRunner

from phatgoose.cli.main import app
from server_command import running

ROOT = Path(__file__).parent.parent


def shell_blocks():
    return re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands():
    """The commands of all blocks, as lists of words: comments left out, quotes and continued lines respected."""
    found = []
    for block in shell_blocks():
        text = re.sub(r"^\s*#.*\n", "", block.replace("\\\n", " "), flags=re.MULTILINE)
        # A line break ends a command unless it is inside quotes.
        parts, quoted, current = [], False, ""
        for character in text:
            quoted ^= character == "'"
            if character == "\n" and not quoted:
                parts.append(current)
                current = ""
            else:
                current += character
        found += [shlex.split(part, comments=True) for part in parts if part.strip()]
    return found


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c[1] for c in commands() if c[0] == "make"]
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def small_recipe(path):
    """The shipped recipe with the tiny base, two experts and tasks from files."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for shipped, here in (
        (r'^base = ".*"', 'base = "./tiny-llama"'),
        (r"^names = .*\nonly = .*", 'tasks = { past = "jsonl:past.jsonl", plural = "jsonl:plural.jsonl" }'),
        (r'"bigbench:hyperbaton"', '"jsonl:unseen.jsonl"'),
    ):
        text, times = re.subn(shipped, here, text, flags=re.MULTILINE)
        assert times == 1, shipped
    Path("small.toml").write_text(text)
    return "small.toml"


def test_every_command_runs(make_base, make_expert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make_base("llama")
    base.model.save_pretrained("tiny-llama")
    base.tokenizer.save_pretrained("tiny-llama")
    for file, asks in (
        ("past", "Today I walk"),
        ("plural", "One goose, two"),
        ("unseen", "Is the sea red or blue"),
    ):
        rows = [{"input": f"{asks} {i}. Well\nAnswer:", "target": f"{file} {i}"} for i in range(60)]
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.move(make_expert(base, "plural").save(tmp_path / "made"), "plural")
    ran = [c for c in commands() if c[0] == "phatgoose"]
    assert len(ran) >= 7
    for command in ran:
        words = [re.sub(r"^bigbench:.*", "jsonl:past.jsonl", w) for w in command[1:]]
        words = [
            "pool" if w == "pools/bigbench-t0" else w for w in words
        ]  # of another base; test_published_pool.py asks it
        for option, few in (
            ("--steps", "2"),
            ("--rows-per-step", "4"),
            ("--validate-every", "1"),
            ("--limit", "4"),
        ):
            if option in words:
                words[words.index(option) + 1] = few
        words = [small_recipe(w) if w.startswith("recipes/") else w for w in words]
        if words[0] in ("train", "gate"):
            words += ["--rows-per-batch", "4"]
        if words[0] in ("train", "eval", "generate", "chat", "ui", "serve"):
            words += ["--base", "./tiny-llama"]
        if words[0] == "generate":
            words += ["--max-new-tokens", "3"]
        if words[0] == "ui":
            with (
                running(*words, last="ended") as address,
                urllib.request.urlopen(address, timeout=60) as page,
            ):
                assert page.status == 200
            continue
        if words[0] == "serve":
            with running(*words) as address:
                for curl in (c for c in commands() if c[0] == "curl"):
                    assert "http://127.0.0.1:8000/" in " ".join(curl)
                    said = [w.replace("http://127.0.0.1:8000", address) for w in curl]
                    done = subprocess.run(
                        [*said, "--silent", "--fail-with-body"], capture_output=True, text=True
                    )
                    assert done.returncode == 0, done.stdout
                    assert json.loads(done.stdout)["choices"][0]["text"] is not None
            continue
        result = CliRunner().invoke(app, words, input="")
        assert result.exit_code == 0, (words, result.output, result.exception)
    assert {p.name for p in Path("pool/experts").iterdir()} == {"past-tense", "plural"}
