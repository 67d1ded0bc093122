"""Named pools and suites, read from pools.toml and suites.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.registry import unknown
from phatgoose.tasks.lists.entries import SAME_DATASET, Entry
from phatgoose.tasks.spec import split_spec

_POOL_KEYS = ("entries", "includes", "excluded", "tasks_of")
_SUITE_KEYS = ("entries", "refuses", "own_copy", "pool")


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
    pool: str = ""
    """The named pool whose experts its entries' `sisters` are."""

    def same_domain(self, entry: Entry) -> tuple[str, ...]:
        """The pool's experts of the entry's domain and another skill: the wrong ones, if a router goes by subject."""
        if not self.pool or not entry.domain:
            return ()
        return tuple(
            e.name for e in pool_entries(self.pool) if e.domain == entry.domain and e.skill != entry.skill
        )


@cache
def pool_entries(name: str) -> tuple[Entry, ...]:
    """The entries of a named pool: a frozen list of tasks, one expert each. Raises UnknownName if there is none."""
    table = _section("pool", name, _POOLS, *_POOL_KEYS)
    included = [entry for other in table.get("includes", ()) for entry in pool_entries(other)]
    held_out = suite(pool_tasks_of(name)).entries if pool_tasks_of(name) else ()
    tasks = [replace(e, sisters=(), tier="") for e in held_out if e.tier != SAME_DATASET]
    return (*included, *tasks, *_entries(name, table))


def pool_tasks_of(name: str) -> str:
    """The suite on whose tasks a named pool's experts are trained; "" if the pool lists tasks of its own."""
    return str(_section("pool", name, _POOLS, *_POOL_KEYS).get("tasks_of", ""))


def pool_excluded(name: str) -> Mapping[str, str]:
    """Tasks that a named pool goes without, as near-duplicates of held-out ones → what each is near to."""
    return dict(_section("pool", name, _POOLS, *_POOL_KEYS).get("excluded", {}))


@cache
def suite(name: str) -> Suite:
    """A named suite. Raises UnknownName if there is none of this name."""
    table = _section("suite", name, _SUITES, *_SUITE_KEYS)
    refuses, own_copy = frozenset(table.get("refuses", ())), tuple(table.get("own_copy", ()))
    return Suite(name, _entries(name, table), refuses, own_copy, table.get("pool", ""))


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
    for task, value in table.get("entries", {}).items():
        fields = dict(value) if isinstance(value, dict) else {"specs": value}
        specs = fields.pop("specs")
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
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
