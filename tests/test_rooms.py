"""A room imports only rooms above it (docs/architecture.md), and `import phatgoose` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import phatgoose

ROOT = Path(phatgoose.__file__).parent
ORDER = [
    {"errors", "records", "registry", "strict_json", "memory", "extras"},
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
WITHIN = {("registry", "errors"), ("fetch", "files"), ("locks", "files")}


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


def test_import_is_light_and_every_public_name_is_there():
    code = "import sys, phatgoose; assert 'torch' not in sys.modules; [getattr(phatgoose, n) for n in phatgoose.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        phatgoose.nothing  # noqa: B018
