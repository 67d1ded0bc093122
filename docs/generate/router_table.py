"""The table of routers in docs/method.md, written from the classes by `cli.py`."""

from __future__ import annotations

import re
from pathlib import Path

from phatgoose.cli.measure.routers import chooses, written
from phatgoose.routers.parse import ROUTERS, router_class

BEGIN, END = "<!-- routers: begin -->", "<!-- routers: end -->"
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def table() -> str:
    """One row for each router of ours."""
    rows = ["| name, with its settings | paper | needs | chooses |", "|---|---|---|---|"]
    for name in ROUTERS.table:
        kind = router_class(name)
        paper = _ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", kind.paper)
        rows.append(f"| `{written(name, kind)}` | {paper} | {kind.needs} | {chooses(kind)} |")
    return "\n".join(rows)


def page(path: Path) -> str:
    """The page at `path` with the table between its two marks."""
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
