"""What messages tell users to install is what pyproject.toml asks for, and pip takes it."""

import re
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from phatgoose import extras

ROOT = Path(__file__).parents[1]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["experiment", "harness", "ray", "serve"])
def test_the_packages_of_an_extra_are_named(extra):
    words = shlex.split(extras.install(extra))
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    names = [re.split(r"[<>=]", word)[0] for word in words[4:]]
    assert sorted(names) == sorted(re.split(r"[<>=]", one)[0] for one in DECLARED[extra])


def test_an_extra_within_an_extra_is_resolved():
    assert set(extras.requirements("serve")) < set(extras.requirements("replicas"))
    assert any(one.startswith("ray[serve]>=") for one in extras.requirements("replicas"))
    assert not any("phatgoose" in one for one in extras.requirements("replicas"))


def test_source_that_was_never_installed_names_the_clone(monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", none)
    assert '".[serve]" in a clone' in extras.install("serve")


def test_no_message_asks_an_index_for_phatgoose():
    """It is on none: `pip install phatgoose` finds no distribution."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "src").rglob("*.py")]
    for page in pages:
        for line in page.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"pip install [\"']?phatgoose(?!-\d)", line) or "finds" in line, (page, line)
