"""Tables of results.md for a suite's measures: all tasks, each tier, and each task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from phatgoose.workflows.experiment.measures.compare import ALL
from phatgoose.workflows.experiment.measures.values import MEASURES
from phatgoose.workflows.experiment.systems import BASE, MAIN, ORACLE, OWN, SISTER

Table = list[list[str]]
FIRST = (BASE, SISTER, OWN, ORACLE)
"""Columns of a table by task that come first: what there is to gain."""
Column = Callable[[Mapping[str, Any]], str]
"""A cell from what is known of a difference."""


def measure_sections(suite: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each measure of a suite: its title, how many tasks and clusters, its tables, and which tasks lack it."""
    return [
        {
            "title": MEASURES[name],
            "primary": number == 0,
            "tasks": len(found[ALL]["tasks"]),
            "clusters": found[ALL].get("clusters"),
            "systems": _systems(found[ALL]),
            "by_task": _by_task(found, suite["tasks"]),
            "undefined": _undefined(found["undefined"]),
        }
        for number, (name, found) in enumerate(suite.get("measures", {}).items())
    ]


def tier_sections(suite: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tier → how many tasks have each measure, and its systems with all of them."""
    measures = suite.get("measures", {})
    tiers = dict.fromkeys(tier for found in measures.values() for tier in found["tiers"])
    found = {tier: {n: m["tiers"][tier] for n, m in measures.items() if tier in m["tiers"]} for tier in tiers}
    return {
        tier: {
            "tasks": ", ".join(f"{MEASURES[n]} {len(part['tasks'])}" for n, part in parts.items()),
            "systems": _tier(parts),
        }
        for tier, parts in found.items()
    }


def _ranked(systems: Mapping[str, Mapping[str, float]]) -> list[str]:
    return sorted(systems, key=lambda system: -systems[system]["mean"])


def _mean(system: Mapping[str, float]) -> str:
    return f"{system['mean']:.3f} ({system['low']:.3f}–{system['high']:.3f})"


def _difference(found: Mapping[str, Any]) -> str:
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


_MORE: dict[str, tuple[str, Column]] = {
    "p_holm": ("p", lambda found: f"{found['p_holm']:.3f}"),
    "clusters": (
        "over clusters",
        lambda found: f"{found['clusters']['low']:+.3f} to {found['clusters']['high']:+.3f}",
    ),
    "smallest": ("shows from", lambda found: f"{found['smallest']:.3f} ({found['smallest_holm']:.3f})"),
}
"""Key of a difference → the head and cells of its column."""


def _columns(part: Mapping[str, Any], more: Iterable[str]) -> dict[str, list[tuple[str, Column]]]:
    """The other system → columns that compare with it, of those keys that its differences have."""
    columns = {}
    for other, differences in part["against"].items():
        known: Mapping[str, Any] = next(iter(differences.values()), {})
        name = "PHATGOOSE" if other == MAIN else other
        columns[other] = [(f"− {name}", _difference), *(_MORE[key] for key in more if key in known)]
    return columns


def _systems(part: Mapping[str, Any]) -> Table:
    """Every system's mean, and its differences with all that is known of them."""
    columns = _columns(part, _MORE)
    rows = [["system", "mean", *(head for one in columns.values() for head, _ in one)]]
    for system in _ranked(part["systems"]):
        rows.append([system, _mean(part["systems"][system]), *_compared(part, columns, system)])
    return rows


def _compared(
    part: Mapping[str, Any], columns: Mapping[str, list[tuple[str, Column]]], system: str
) -> Iterable[str]:
    for other, mine in columns.items():
        found = part["against"][other].get(system)
        yield from (cell(found) if found else "" for _, cell in mine)


def _tier(parts: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {name: _columns(part, ["p_holm"]) for name, part in parts.items()}
    head = [
        text
        for name, others in columns.items()
        for text in (MEASURES[name], *(head for one in others.values() for head, _ in one))
    ]
    rows = [["system", *head]]
    order = dict.fromkeys(system for part in parts.values() for system in _ranked(part["systems"]))
    for system in order:
        cells = [system]
        for name, part in parts.items():
            mine = part["systems"].get(system)
            cells += ["" if mine is None else _mean(mine), *_compared(part, columns[name], system)]
        rows.append(cells)
    return rows


def _by_task(found: Mapping[str, Any], tasks: Mapping[str, Any]) -> Table:
    """What each system scores on each task."""
    measured = {system for one in found["tasks"].values() for system in one["systems"]}
    ranked = _ranked(found[ALL]["systems"])
    systems = list(dict.fromkeys(s for s in (*FIRST, *ranked, *sorted(measured)) if s in measured))
    near = any(tasks[task].get("tier") for task in found["tasks"])
    compares = any("compares" in one for one in found["tasks"].values())
    rows = [["task", *(["tier", "cluster"] if near else []), *(["compares"] if compares else []), *systems]]
    for task, one in found["tasks"].items():
        cells = [task]
        if near:
            cells += [tasks[task].get("tier", ""), tasks[task].get("cluster", "")]
        if compares:
            cells.append(one["compares"])
        rows.append(cells + [f"{one['systems'][s]:.3f}" if s in one["systems"] else "" for s in systems])
    return rows


def _undefined(undefined: Mapping[str, str]) -> dict[str, list[str]]:
    """Why → the tasks that lack the measure for that reason."""
    found: dict[str, list[str]] = {}
    for task, why in undefined.items():
        found.setdefault(why, []).append(task)
    return found
