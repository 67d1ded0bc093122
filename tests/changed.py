"""`pytest --changed`: only the tests that the change since a commit can break, nearest first, within a time budget.

A test file can break if it imports a changed file, at any remove. Imports are read from the source, also those
inside functions and the module names in strings by which commands, routers and task sources are found. What
can't start in time is skipped and counted.
"""

from __future__ import annotations

import ast
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TESTS = ROOT / "src", ROOT / "tests"
DISTANCE = pytest.StashKey[dict[Path, int]]()
STARTED = pytest.StashKey[float]()
ALWAYS = {"conftest.py", "changed.py"}  # every test runs on them


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("changed")
    group.addoption(
        "--changed",
        nargs="?",
        const="HEAD",
        metavar="COMMIT",
        help="run what the change since COMMIT can break",
    )
    group.addoption(
        "--changed-seconds",
        type=float,
        default=60,
        help="with --changed: start no test so long after the first",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (commit := config.getoption("--changed")) is not None:
        config.stash[DISTANCE] = distances(changed_files(commit))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that can't break aren't even imported."""
    if (
        DISTANCE in config.stash
        and collection_path.is_file()
        and collection_path not in config.stash[DISTANCE]
    ):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if DISTANCE in config.stash:
        items.sort(key=lambda item: config.stash[DISTANCE][item.path])
    else:
        start_long_files_first(items)


def start_long_files_first(items: list[pytest.Item]) -> None:
    """Whole files go to one worker each. Where the longest start last, one worker is alone with them at the end."""
    seconds: dict[Path, float] = {}
    for function in {(item.path, getattr(item, "originalname", item.name)): item for item in items}.values():
        mark = function.get_closest_marker("slow")
        seconds[function.path] = seconds.get(function.path, 0) + (mark.args[0] if mark else 0)
    items.sort(key=lambda item: -seconds[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    stash, now = item.config.stash, time.monotonic()
    if DISTANCE in stash and now - stash.setdefault(STARTED, now) > item.config.getoption(
        "--changed-seconds"
    ):
        pytest.skip("no time left; `make test` runs it")


def changed_files(commit: str) -> set[Path]:
    def names(*words: str) -> list[str]:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")

    found = names("diff", "--name-only", "-z", commit) + names(
        "ls-files", "--others", "--exclude-standard", "-z"
    )
    return {ROOT / name for name in found if name}


def distances(changed: set[Path]) -> dict[Path, int]:
    """Test file → over how many imports it reaches a changed file; 0: it is one. Files that reach none are left out."""
    if any(path.name in ALWAYS and path.parent == TESTS for path in changed):
        return dict.fromkeys(TESTS.rglob("test_*.py"), 0)
    importers = importers_of_files()
    distance = dict.fromkeys(changed, 0)
    reached = list(changed)
    for path in reached:
        for importer in importers.get(path, ()):
            if importer not in distance:
                distance[importer] = distance[path] + 1
                reached.append(importer)
    for path in changed:  # a kernel's source, a template, a table: the tests of its room
        if SOURCE in path.parents and path.suffix != ".py":
            room = TESTS / path.relative_to(SOURCE / "phatgoose").parts[0]
            distance |= dict.fromkeys(room.rglob("test_*.py"), 1)
    return distance


def importers_of_files() -> dict[Path, set[Path]]:
    """File → the files that import it, in src and tests."""
    names: dict[str, Path] = {}
    for path in SOURCE.rglob("*.py"):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    names |= {path.stem: path for path in TESTS.rglob("*.py") if path.name not in ALWAYS}
    importers: dict[Path, set[Path]] = {}
    for path in names.values():
        for name in imported_names(path):
            if name in names and names[name] != path:
                importers.setdefault(names[name], set()).add(path)
    return importers


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (
                found[0] for found in re.finditer(r"phatgoose(\.\w+)+", node.value) if len(node.value) < 100
            )
