"""Names → objects, loaded on first use, with suggestions for a misspelt name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from phatgoose.errors import UnknownName


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
    """The error for `name`, with the closest known names (or all of them when there are few)."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        tail = f"did you mean {' or '.join(repr(c) for c in close)}?"
    elif len(names) <= 30:
        tail = "known: " + (", ".join(names) if names else "none")
    else:
        tail = f"there are {len(names)} known names, {names[0]!r} to {names[-1]!r}"
    return UnknownName(f"unknown {kind} {name!r}: {tail}{'. ' + hint if hint else ''}")


def lookup(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object that `table` gives for `name` as "module:attribute", imported now.

    Raises:
        UnknownName: if `name` is not in `table`.
    """
    if name not in table:
        raise unknown(kind, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
