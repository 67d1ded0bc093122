"""A room imports only rooms above it (docs/architecture.md), and `import phatgoose` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import phatgoose

ROOT = Path(phatgoose.__file__).parent
ORDER = [
    {"errors", "records", "registry", "strict_json", "memory", "extras", "shipped", "templates"},
    {"files", "fetch", "locks", "pip_sdist", "fingerprints", "hub_errors"},
    {"tasks", "ops"},
    {"experts"},
    {"routers"},
    {"models"},
    {"training", "evaluation", "analysis", "serving", "vllm"},
    {"workflows"},
    {"ui"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Rooms on one level don't know each other, but for these.
WITHIN = {("registry", "errors"), ("fetch", "files"), ("fetch", "locks"), ("locks", "files")}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phatgoose"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("phatgoose."))


@pytest.mark.parametrize(
    "path",
    sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_imports_only_rooms_above(path):
    room = room_of(path)
    for other in imports_of(path):
        if other != room and other != "__version__":
            assert LEVEL[other] < LEVEL[room] or (room, other) in WITHIN, f"{path} of {room} imports {other}"


def modules():
    """Module name → path, of every file in the package."""
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = ["phatgoose", *path.relative_to(ROOT).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported_files(path, names):
    """The modules that a file imports anywhere: at its top, in functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)


def test_no_circle_of_files():
    names = modules()
    graph = {name: set(imported_files(path, names)) - {name, "phatgoose"} for name, path in names.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("files import one another: " + " ← ".join(error.args[1]))


@pytest.mark.parametrize(
    "folder", sorted({p.parent for p in ROOT.rglob("*.py")} - {ROOT}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_folder_is_small_and_says_what_it_is_for(folder):
    assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 15
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert len(docstring.split()) >= 10, (
        "say what the room is for, what enters, what leaves, where to add something"
    )


@pytest.mark.slow(3)
def test_import_is_light_and_every_public_name_is_there():
    code = (
        "import sys, phatgoose; assert 'torch' not in sys.modules; "
        "[getattr(phatgoose, n) for n in phatgoose.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        phatgoose.nothing  # noqa: B018
