"""The README's blocks run one after the other, as a reader types them (see `pages`)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from pages import ROOT, commands, runnable

pytest_plugins = ["pages"]

README = ROOT / "README.md"
NOT_RUN = {
    "make quickstart": "takes 25 minutes and fetches the real base and tasks",
    ". .venv/bin/activate": "changes the shell that it is typed into",
}
"""How blocks begin that aren't run here → why."""


@pytest.mark.slow(82)
def test_every_block_runs(reader):
    """What the text says that a clone has is there: the recipes, and a pool, here of the tiny base
    (test_published_pool.py asks the real one)."""
    assert "A clone of this repository also holds 24 experts" in README.read_text(encoding="utf-8")
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("pools").mkdir()
    Path("pools/bigbench-t0").symlink_to(Path("pool").absolute())  # the block before makes it
    reader.read(README, NOT_RUN)
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
