"""The table of architectures in docs/bases.md: what the checks say now, and what the page says."""

from __future__ import annotations

import functools
import re
import sys
import traceback
import warnings
from pathlib import Path

from architecture_checks import CHECKS, BaseFails, case

from architectures import ALL
from phatgoose import unroute
from phatgoose.errors import PhatgooseError


def outcome(name: str, check: str) -> str:
    """ "yes", or what our own error (or, where it fails without us, the plain model) says.
    Anything else that is raised is a fault."""
    try:
        found = case(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                CHECKS[check](found)
        finally:
            unroute(found.base)
    except (PhatgooseError, BaseFails) as error:
        words = " ".join(str(error).split())
        return re.sub(r" \(?/[^ ,)]*/e\d\)?", "", words)  # without the adapter's temporary folder
    return "yes"


# --- The table in docs/bases.md

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
BEGIN, END = "<!-- architectures: written by tests/models/architecture_table.py -->\n", "<!-- end -->"


@functools.cache
def recorded() -> dict[tuple[str, str], str]:
    """(architecture, check) → "yes" or why it is refused, as the page says."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    right = re.findall(r"`([^`]+)`", re.search(r"^Correct in every column: (.*)$", text, re.MULTILINE)[1])
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    found = {(name, check): "yes" for name in right for check in CHECKS}
    for line in re.findall(r"^\| `(.*) \|$", text, re.MULTILINE):
        name, *cells = line.replace("` |", " |").split(" | ")
        said = [notes[cell[1:-1]] if cell.startswith("(") else cell for cell in cells]
        found |= {(name, check): words for check, words in zip(CHECKS, said, strict=True)}
    return found


def _table(outcomes: dict[tuple[str, str], str]) -> str:
    notes: list[str] = []

    def cell(said: str) -> str:
        if said == "yes":
            return said
        if said not in notes:
            notes.append(said)
        return f"({notes.index(said) + 1})"

    rows = {name: [outcomes[name, check] for check in CHECKS] for name in ALL}
    right = [name for name, cells in rows.items() if set(cells) == {"yes"}]
    lines = ["Correct in every column: " + ", ".join(f"`{name}`" for name in right), ""]
    lines += ["| | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    lines += [
        f"| `{name}` | " + " | ".join(map(cell, cells)) + " |"
        for name, cells in rows.items()
        if name not in right
    ]
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""])


def _tell(name: str, check: str) -> str:
    try:
        return outcome(name, check)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"FAULT {type(error).__name__}: {' '.join(str(error).split())} "
            f"({Path(place.filename).name}:{place.lineno})"
        )


def main(said: list[str]) -> None:
    """Prints each cell that isn't "yes"; --write: all cells into the page, if none is a fault."""
    names = [n for n in said if n in ALL] or list(ALL)
    checks = [c for c in said if c in CHECKS] or list(CHECKS)
    outcomes = {}
    for name in names:
        outcomes |= (row := {(name, check): _tell(name, check) for check in checks})
        print(
            name,
            *(f"    {check}: {words}" for (_, check), words in row.items() if words != "yes"),
            sep="\n",
            flush=True,
        )
    faults = [cell for cell, words in outcomes.items() if words.startswith("FAULT")]
    if "--write" in said:
        assert not faults, faults
        assert len(outcomes) == len(ALL) * len(CHECKS), "--write takes no names: the page has all cells"
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + _table(outcomes) + END + rest.partition(END)[2], encoding="utf-8")


if (
    __name__ == "__main__"
):  # PYTHONPATH=tests python -W ignore tests/models/architecture_table.py [NAME …] [CHECK …] [--write]
    main(sys.argv[1:])
