"""The tree of files in docs/architecture.md, written by `cli.py` from the first line of each file's docstring."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "phatgoose"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
ROOMS = (
    *("tasks", "experts", "ops", "routers", "models", "training", "evaluation", "analysis"),
    *("serving", "vllm", "workflows", "ui", "cli"),
)
"""In the order in which data walks through them."""
WIDTH, NAME_WIDTH = 100, 30


def description(path: Path) -> str:
    """The first line of a file's docstring without its full stop.

    Raises:
        ValueError: if there is none, or it is no single line of at most `WIDTH` characters.
    """
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")
    if not lines[0].endswith((".", "?")) or len(lines[0]) > WIDTH or "".join(lines[1:2]):
        raise ValueError(
            f"{path}: begin its docstring with one sentence on one line of at most {WIDTH} characters"
        )
    return lines[0].removesuffix(".")


def folder_tree(folder: Path, depth: int) -> list[str]:
    """A line for each Python file below a folder, and for each folder; files come first."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(f"{'  ' * depth}{path.name:<{NAME_WIDTH - 2 * depth}} {description(path)}")
    for package in sorted(folder.glob("*/__init__.py")):
        lines += folder_entry(package, depth)
    return lines


def folder_entry(package: Path, depth: int) -> list[str]:
    name = f"{package.parent.name}/"
    heading = f"{'  ' * depth}{name:<{NAME_WIDTH - 2 * depth}} {description(package)}"
    return [heading, *folder_tree(package.parent, depth + 1)]


def tree() -> str:
    parts = [
        [
            f"{p.name:<{NAME_WIDTH}} {description(p)}"
            for p in sorted(SOURCE.glob("*.py"))
            if p.name != "__init__.py"
        ]
    ]
    parts += [folder_entry(SOURCE / room / "__init__.py", 0) for room in ROOMS]
    return "```text\n" + "\n\n".join("\n".join(part) for part in parts) + "\n```"


def page(path: Path) -> str:
    """The page at `path` with the tree between its two marks."""
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    return f"{head}{BEGIN}\n{tree()}\n{END}{rest.split(END)[1]}"
