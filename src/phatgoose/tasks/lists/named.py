"""Named pools and suites, read from pools.toml and suites.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.registry import unknown
from phatgoose.tasks.lists.entries import Entry
from phatgoose.tasks.spec import split_spec

_POOL_KEYS = ("entries", "includes", "excluded")
_SUITE_KEYS = ("entries", "refuses", "own_copy")


@dataclass(frozen=True)
class Suite:
    """Tasks measured together; a model's score on it is their unweighted mean."""

    name: str
    entries: tuple[Entry, ...]
    refuses: frozenset[str] = frozenset()
    """Datasets beyond its own that no expert may hold."""
    own_copy: tuple[str, ...] = ()
    """Entries whose data can't be fetched. Without the user's own copy in a folder they are left out, and
    results say so."""


@cache
def pool_entries(name: str) -> tuple[Entry, ...]:
    """The entries of a named pool: a frozen list of tasks, one expert each. Raises UnknownName if there is none."""
    table = _section("pool", name, _POOLS, *_POOL_KEYS)
    included = [entry for other in table.get("includes", ()) for entry in pool_entries(other)]
    return (*included, *_entries(name, table))


def pool_excluded(name: str) -> Mapping[str, str]:
    """Tasks that a named pool goes without, as near-duplicates of held-out ones → what each is near to."""
    return dict(_section("pool", name, _POOLS, *_POOL_KEYS).get("excluded", {}))


@cache
def suite(name: str) -> Suite:
    """A named suite. Raises UnknownName if there is none of this name."""
    table = _section("suite", name, _SUITES, *_SUITE_KEYS)
    refuses, own_copy = frozenset(table.get("refuses", ())), tuple(table.get("own_copy", ()))
    return Suite(name, _entries(name, table), refuses, own_copy)


def _read(file: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("phatgoose.tasks.lists").joinpath(file).read_text("utf-8"))


def _section(kind: str, name: str, tables: Mapping[str, dict[str, Any]], *keys: str) -> dict[str, Any]:
    if name not in tables:
        raise unknown(kind, name, tables)
    for key in tables[name]:
        if key not in keys:
            raise unknown(f"key of {kind} {name}", key, keys)
    return tables[name]


def _entries(name: str, table: Mapping[str, Any]) -> tuple[Entry, ...]:
    entries = []
    for task, value in table["entries"].items():
        fields = dict(value) if isinstance(value, dict) else {"specs": value}
        specs = fields.pop("specs")
        try:
            entry = Entry(task, (specs,) if isinstance(specs, str) else tuple(specs), **fields)
        except TypeError as cause:
            raise TaskError(f"{name}, {task}: {cause}.") from cause
        for spec in entry.specs:
            split_spec(spec)  # raises if it is malformed
        entries.append(entry)
    return tuple(entries)


_POOLS, _SUITES = _read("pools.toml"), _read("suites.toml")
POOLS, SUITES = tuple(_POOLS), tuple(_SUITES)
"""The names, in the order of their files."""
