"""The README's blocks run one after the other, as a reader types them (see `pages`)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from pages import ROOT, adapters, commands, runnable
from phatgoose import Expert, Pool

pytest_plugins = ["pages"]

README = ROOT / "README.md"
NOT_RUN = {
    "pip install": "sets up an environment: fetches gigabytes of packages",
    "make quickstart": "takes 25 minutes and fetches the real base and tasks",
}
"""How blocks begin that aren't run here → why."""


@pytest.mark.slow(82)
def test_every_block_runs(reader, make_base, make_expert):
    """The pool that comes with phatgoose is one of the tiny base here (test_published_pool.py asks the real one)."""
    adapters(make_base, make_expert)
    Pool([Expert.from_peft(folder) for folder in Path("adapters").iterdir()]).save("bigbench-t0")
    reader.read(README, NOT_RUN)
    assert {p.name for p in Path("mypool/experts").iterdir()} == {p.name for p in Path("adapters").iterdir()}
    assert {p.name for p in Path("pool/experts").iterdir()} == {"past-tense", "plural"}
    assert any('"choices"' in text for text in reader.output)


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = [
        c[1]
        for block in runnable(README)
        if block.language == "sh"
        for c in commands(block.text)
        if c[0] == "make"
    ]
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_extras_that_the_readme_names_are_those_there_are():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sentence = re.search(
        r'`pip install "\.\[(\w+)\]"`.*?\((.*?) are the other extras\)', README.read_text(), re.DOTALL
    )
    assert {sentence[1], *re.findall(r"`(\w+)`", sentence[2])} == {*declared} - {"dev"}
