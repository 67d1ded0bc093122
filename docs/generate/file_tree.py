"""The tree of files in docs/architecture.md, written by `cli.py` from the first line of each file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "phatgoose"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
ROOMS = (
    *("tasks", "experts", "ops", "routers", "models", "training", "evaluation", "analysis"),
    *("serving", "vllm", "workflows", "ui", "cli"),
)
"""In the order in which data walks through them."""
LISTED = {".py", ".toml", ".json", ".j2", ".cpp", ".h", ".inc"}
COMMENT = re.compile(r"(?:#|//|\{#) (.*?)(?: #\})?")
WIDTH, NAME_WIDTH = 100, 30


class FirstLineError(ValueError):
    """A file doesn't begin with one sentence that says what it is for."""


def description(path: Path) -> str:
    """What a file is for, without a full stop: the first line of its docstring or, where the file isn't Python, the
    first sentence of the comment that it begins with; "" if it begins with none.

    Raises:
        FirstLineError: there is no docstring, or the sentence is longer than `WIDTH` characters or than one line.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return _checked(path, _first_comment(text))
    first, _, rest = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    if not first.endswith((".", "?")) or rest.partition("\n")[0]:
        raise FirstLineError(_rule(path))
    return _checked(path, first.removesuffix("."))


def _checked(path: Path, sentence: str) -> str:
    if len(sentence) >= WIDTH:
        raise FirstLineError(_rule(path))
    return sentence


def _rule(path: Path) -> str:
    kind = "docstring" if path.suffix == ".py" else "first comment"
    return f"{path}: begin its {kind} with one sentence on one line of at most {WIDTH} characters."


def _first_comment(text: str) -> str:
    words = []
    for line in text.splitlines():
        if (comment := COMMENT.fullmatch(line.strip())) is None:
            break
        words.append(comment[1])
    return " ".join(words).partition(". ")[0].removesuffix(".")


def file_line(path: Path, depth: int = 0) -> str:
    return f"{'  ' * depth}{path.name:<{NAME_WIDTH - 2 * depth}} {description(path)}".rstrip()


def folder_tree(folder: Path, depth: int) -> list[str]:
    """A line for each file below a folder that is code or data, and for each folder; files come first."""
    files = [path for path in folder.iterdir() if path.suffix in LISTED and path.name != "__init__.py"]
    lines = [file_line(path, depth) for path in sorted(files)]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(path.suffix in LISTED for path in inner.iterdir()):
            lines += folder_entry(inner, depth)
    return lines


def folder_entry(folder: Path, depth: int) -> list[str]:
    """The folder with what its `__init__.py`, if it has one, says, and everything below it."""
    package = folder / "__init__.py"
    text = description(package) if package.is_file() else ""
    heading = f"{'  ' * depth}{f'{folder.name}/':<{NAME_WIDTH - 2 * depth}} {text}".rstrip()
    return [heading, *folder_tree(folder, depth + 1)]


def tree() -> str:
    parts = [[file_line(p) for p in sorted(SOURCE.glob("*.py")) if p.name != "__init__.py"]]
    parts += [folder_entry(SOURCE / room, 0) for room in ROOMS]
    return "```text\n" + "\n\n".join("\n".join(part) for part in parts) + "\n```"


def page(path: Path) -> str:
    """The page at `path` with the tree between its two marks."""
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    return f"{head}{BEGIN}\n{tree()}\n{END}{rest.split(END)[1]}"
