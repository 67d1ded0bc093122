"""Names → objects that are imported on first use: ours, and those of other packages."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from phatgoose.errors import PluginError, UnknownName


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
    """The object that `table` gives for `name` as "module:attribute" or "module", imported now; or UnknownName."""
    if name not in table:
        raise unknown(kind, name, table)
    module, _, attribute = table[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


class Registry(Collection[str]):
    """Objects of one kind by name: a table of ours, then the entry points that installed packages declare in `group`.

    Names are listed without importing anything. `registry[name]` imports the object.
    """

    def __init__(self, kind: str, group: str, table: Mapping[str, str], reserved: Iterable[str] = ()):
        """`reserved`: further names that mean something else where these are used, so that a package can't
        take them."""
        self.kind, self.group, self.table, self.reserved = kind, group, table, frozenset(reserved)

    @cached_property
    def plugins(self) -> dict[str, list[EntryPoint]]:
        """What other packages add, by name in small letters. More than one entry point under a name is a clash."""
        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self.group), key=lambda p: (p.name, _package(p))):
            found.setdefault(point.name.lower(), []).append(point)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.table, *self.plugins)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self.table or name in self.plugins

    def __getitem__(self, name: str) -> Any:
        """The object of this name.

        Raises:
            UnknownName: there is none. PluginError: a package's can't be imported, or two have this name.
        """
        self.check_clash(name)
        if name not in self:
            raise unknown(self.kind, name, self)
        if name in self.table:
            return lookup(self.kind, name, self.table)
        point = self.plugins[name][0]
        try:
            return point.load()
        except Exception as cause:  # whatever a stranger's module raises
            raise PluginError(
                f"the {self.kind} {name!r} of the package {_package(point)} can't be imported from {point.value!r}: "
                f"{type(cause).__name__}: {cause}. Mend or uninstall that package."
            ) from cause

    def check_clash(self, name: str) -> None:
        """Raises PluginError if several packages, phatgoose among them, use this name."""
        points = self.plugins.get(name, [])
        ours = ["phatgoose"] * (name in self.table or name in self.reserved)
        if points and len(packages := [*ours, *map(_package, points)]) > 1:
            raise PluginError(
                f"the {self.kind} name {name!r} is taken by {' and '.join(packages)}, so it isn't known "
                "which one is meant. Uninstall a package, or ask its author for another name."
            )

    def package(self, name: str) -> str:
        """The package that brings this name."""
        return "phatgoose" if name in self.table else ", ".join(map(_package, self.plugins[name]))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module
