"""Which tasks of the tier "sisters" count: rules on gains over the base on validation rows.

Routing can only be compared where there is something to gain and an expert of the pool gains some of it. So a task is
measured only if an expert of its own training rows is better than the base alone, and so is one of the experts that
its suite names beforehand. Both are found out on validation rows, before a test row is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phatgoose.tasks.lists.entries import TIERS

SISTERS = TIERS[1]
"""The tier whose tasks are admitted."""

_DECIMALS = 9
"""Gains are compared rounded, so that .1 is .1 however it was summed."""


def verdict(found: Mapping[str, Any], own_gain: float, sister_gain: float) -> dict[str, Any]:
    """What was found of a task, with {"sister", "admitted", "why"}: its best sister, and what it lacks, if anything.

    Args:
        found: "own", and "sisters" by name, each with "gain", "low" and "high" over the base.
        own_gain, sister_gain: the least gains. The own expert's interval must also lie above 0.
    """
    own, sisters = found["own"], found["sisters"]
    best = max(sisters, key=lambda name: sisters[name]["gain"], default=None)
    lacks = []
    if round(own["gain"], _DECIMALS) < own_gain or own["low"] <= 0:
        lacks.append(f"its own expert gains {_gain(own)}, expected {own_gain:+.3f} and an interval above 0")
    if best is None:
        lacks.append("none of its sisters is in the pool")
    elif round(sisters[best]["gain"], _DECIMALS) < sister_gain:
        lacks.append(f"its best sister, {best}, gains {_gain(sisters[best])}, expected {sister_gain:+.3f}")
    return {**found, "sister": best, "admitted": not lacks, "why": "; ".join(lacks)}


def _gain(one: Mapping[str, float]) -> str:
    return f"{one['gain']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"


def admission_tables(admission: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """ "Admitted" and "Not admitted" → those tasks with their numbers on validation rows; without tasks, no table."""
    tables: dict[str, list[list[str]]] = {}
    for task, found in admission.items():
        head = ["task", "rows", "base", "own expert", "− base", "best sister", "its score", "− base"]
        name = found["sister"]
        sister = found["sisters"].get(name)
        cells = [
            task, str(found["rows"]), f"{found['base']:.3f}", f"{found['own']['mean']:.3f}", _gain(found["own"]),
            *([name, f"{sister['mean']:.3f}", _gain(sister)] if sister else ["", "", ""]),
        ]  # fmt: skip
        tables.setdefault("Admitted" if found["admitted"] else "Not admitted", [head]).append(cells)
    return dict(sorted(tables.items()))
