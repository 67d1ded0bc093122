"""Print for commands: coloured on a terminal, plain and never cut when piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def visible(text: str) -> str:
    """Text of strangers' files for a terminal: unprintable characters are escaped, so that they can't control it."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def say(text: str = "") -> None:
    """A line of the answer, on standard output."""
    print(text, flush=True)


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, one per line."""
    width = max(len(name) for name, _ in rows)
    console = Console()
    for name, value in rows:
        console.print(Text.assemble((f"{name:<{width}}  ", "bold"), visible(value)), soft_wrap=True)


def note(text: str) -> None:
    """Something about the answer, on standard error."""
    Console(stderr=True).print(Text(visible(text), style="dim"), soft_wrap=True)


def warn(text: str) -> None:
    """Something to look at, on standard error."""
    Console(stderr=True).print(Text.assemble(("warning: ", "bold yellow"), visible(text)), soft_wrap=True)


def fail(text: str) -> None:
    """Why a command stopped, on standard error."""
    sys.stdout.flush()
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), visible(text)), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Rows of text under `columns`; the columns named in `numbers` are set to the right."""
    rows = [[visible(cell.replace("\n", " ")) for cell in row] for row in rows]
    console = Console()
    if console.is_terminal:
        grid = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column, name in zip(grid.columns, columns, strict=True):
            column.justify = "right" if name in numbers else "left"
            column.overflow = "fold"
        for row in rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        ]
        say("  ".join(cells).rstrip())
