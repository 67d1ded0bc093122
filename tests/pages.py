"""Runs the shell and Python blocks of a page of documentation, in order, in an empty folder.

What is put in the place of something large lies outside of the folder: a tiny random model is the default base,
a tiny encoder the default encoder, and small files are BIG-bench. Counts of steps, rows and tokens are made
small. Commands of phatgoose run in this process, servers in one of their own.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import pytest
from typer.testing import CliRunner

from encoder_fixtures import make_encoder
from phatgoose.files import cache_folder, sha256_file
from phatgoose.models.base import gguf, load
from phatgoose.models.base import sentence_encoder as encoder
from server_command import running

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = {"--steps": "2", "--validate-every": "1", "--limit": "4", "--limit-train": "8"}
LINES = {
    "linguistic_mappings/past_tense_json": ("Today I walk {}. Yesterday I", "walked {}"),
    "linguistic_mappings/plural_json": ("one goose {}, two", "geese {}"),
    "linguistic_mappings/sentence_negation_json": ("It is {}.", "It is not {}."),
    "intent_recognition": ("Play song {}", "play"),
    "qa_wikidata": ("The sum of 0 and {} is", "{}"),
    "hyperbaton": ("Is it red {} or {} red?", "red {}"),
}
"""BIG-bench tasks that pages name → a prompt and an answer, which take a number."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("sh", "python")]


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, as lists of words: comments left out, quotes and continued lines respected."""
    text = re.sub(r"^\s*#.*\n", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    parts, quoted, current = [], False, ""
    for character in text:  # a line break ends a command unless it is inside quotes
        quoted ^= character == "'"
        if character == "\n" and not quoted:
            parts.append(current)
            current = ""
        else:
            current += character
    return [shlex.split(part, comments=True) for part in parts if part.strip()]


@pytest.fixture
def reader(make_base, tmp_path, monkeypatch):
    """A `Reader` in an empty folder, with stand-ins for what is large."""
    stand_ins(tmp_path, make_base("llama"), monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    encoder.load_encoder.cache_clear()
    found = Reader()
    with found.servers:
        yield found
    encoder.load_encoder.cache_clear()


def stand_ins(folder: Path, base, monkeypatch) -> None:
    """Puts the tiny base, encoder and tasks where phatgoose finds the large ones before it fetches anything."""
    sha256 = load.ALIASES[load.DEFAULT_BASE].sha256
    copy = folder / "cache" / "bases" / f"{load.DEFAULT_BASE}-{sha256[:16]}"
    base.model.save_pretrained(copy)
    base.tokenizer.save_pretrained(copy)
    files = {p.name: sha256_file(p) for p in copy.iterdir()}
    record = {"format": gguf.FORMAT, "source": {"sha256": sha256}, "files": files}
    (copy / gguf.RECORD).write_text(json.dumps(record))
    kernels = (
        cache_folder() / "kernels"
    )  # compiled ones are found again, as on any machine where phatgoose has run
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("PHATGOOSE_CACHE", str(folder / "cache"))
    for name, (prompt, answer) in LINES.items():
        place = folder / "bigbench" / name
        place.mkdir(parents=True)
        if "/" in name:
            (place.parent / "task.json").write_text("{}")
        rows = [{"input": prompt.format(i, i), "target": answer.format(i, i)} for i in range(60)]
        (place / "task.json").write_text(json.dumps({"examples": rows}))
    monkeypatch.setenv("PHATGOOSE_BIGBENCH", str(folder / "bigbench"))
    standing_in = make_encoder(folder / "encoder", max_tokens=60)
    monkeypatch.setattr(encoder, "_pinned", lambda: standing_in)


def adapters(make_base, make_expert) -> None:
    """Adapters of the default base in `adapters/`, as PEFT writes them: without gates and records."""
    for seed, name in enumerate(("dates", "plurals", "recipes")):
        expert = make_expert(make_base("llama"), name, seed=seed, gates=False)
        shutil.copytree(expert.folder, folder := Path("adapters") / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = load.DEFAULT_BASE
        (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass
class Reader:
    """Somebody who types what a page says. `close` ends the servers they have started."""

    names: dict = field(default_factory=dict)
    """What Python blocks have defined so far."""
    servers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    addresses: dict[str, str] = field(default_factory=dict)
    """The address on a page → where that server really is."""
    output: list[str] = field(default_factory=list)

    def read(self, page: Path, not_run: Mapping[str, str], only: str = "") -> None:
        """Runs a page's blocks, but for those that begin as `not_run` says; each of these must be there, and no other.

        Args:
            not_run: the beginning of a block → why it can't run here.
        """
        skipped = set()
        for block in runnable(page):
            if starts := [start for start in not_run if block.text.startswith(start)]:
                skipped |= {*starts}
            elif only in block.text:
                self.run(block)
        assert only or skipped == {*not_run}, f"{page.name} has no such blocks: {not_run.keys() - skipped}"

    def run(self, block: Block) -> None:
        if block.language == "python":
            self.python(block.text)
            return
        for words in commands(block.text):
            match words[0]:
                case "phatgoose" if words[1] in ("serve", "ui"):
                    self.serve(words[1:])
                case "phatgoose":
                    self.phatgoose(words[1:])
                case "curl":
                    self.curl(words)
                case "python":
                    assert words[1] == "-c", words
                    self.python(words[2])
                case _:
                    raise AssertionError(f"nothing runs {words}: say why in the test's list")

    def python(self, code: str) -> None:
        code = re.sub(r"\bsteps=\d+", "steps=2", code)
        exec(compile(self._addressed(code), "a block", "exec"), self.names)

    def phatgoose(self, words: list[str]) -> None:
        from phatgoose.cli.main import app

        words = [SMALL.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        words = [name for word in words for name in (sorted(glob(word)) if word.endswith("/*") else [word])]
        if words[0] == "generate":
            words += ["--max-new-tokens", "3"]
        if words[0] == "experiment" and "--check" not in words:
            words += ["--workers", "0"]
        result = CliRunner().invoke(app, words, input="")
        assert result.exit_code == 0, (words, result.output, result.exception)
        self.output.append(result.output)

    def serve(self, words: list[str]) -> None:
        last, port = ("ended", 8746) if words[0] == "ui" else ("", 8000)
        address = self.servers.enter_context(running(*words, last=last)).rstrip("/")
        self.addresses[f"http://127.0.0.1:{port}"] = address
        with urllib.request.urlopen(f"{address}/{'' if words[0] == 'ui' else 'health'}", timeout=60) as page:
            assert page.status == 200

    def curl(self, words: list[str]) -> None:
        asked = [self._addressed(word) for word in words]
        assert asked != words, f"no command on the page has started a server for {words}"
        done = subprocess.run([*asked, "--silent", "--fail-with-body"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        self.output.append(done.stdout)

    def _addressed(self, text: str) -> str:
        for said, address in self.addresses.items():
            text = text.replace(said, address)
        return text
