"""What the page shows, as plain data made from checked results: tables, plot, heat map."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from phatgoose.analysis.measures import effective_number

HELD_OUT = ("held-out", "unseen")
GROUPS = {
    "in-pool": "Tasks the pool has experts for",
    **dict.fromkeys(HELD_OUT, "Held-out tasks, seen by no expert"),
}
COLOURS = 7
"""Okabe and Ito's colours, readable on light and dark: orange, sky, green, yellow, blue, vermilion, purple."""
TASKS_ACROSS = 8
"""Most tasks side by side in a table."""
EDGES = 4
"""Kinds of underline. With the colours they tell 28 experts apart; letters tell any number apart."""


def letters(index: int) -> str:
    """A, B, …, Z, AA, AB, …: the letter of an expert, for readers who can't go by colour."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(65 + rest) + text
    return text


def legend(names: Iterable[str]) -> list[dict[str, Any]]:
    """Letter, colour and edge of each expert, in order of first mention."""
    return [
        {"name": name, "letter": letters(i), "colour": i % COLOURS, "edge": i // COLOURS % EDGES}
        for i, name in enumerate(dict.fromkeys(names))
    ]


def short_names(names: list[str]) -> list[str]:
    """Task names for narrow columns: without source, folder and "_json", unless two names would then be equal."""
    short = [name.split(":", 1)[-1].rsplit("/", 1)[-1].removesuffix("_json") or name for name in names]
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def view(data: dict[str, Any], marks: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the template needs besides `data` (checked results) and `marks` (the legend)."""
    experts = data.get("experts", [])
    gate_shares = [e["gate_token_share"] for e in experts if "gate_token_share" in e]
    labels = short_names([t["name"] for t in data["tasks"]])
    tasks = [{**t, "label": label} for t, label in zip(data["tasks"], labels, strict=True)]
    groups: list[dict[str, Any]] = [
        {
            "key": key,
            "label": GROUPS.get(key, key),
            "tasks": [t for t in tasks if t["group"] == key],
            "differences": _differences(data, key),
        }
        for key in dict.fromkeys(t["group"] for t in tasks)
    ]
    return {
        "headlines": [h for group in groups if (h := _headline(data, group))],
        "tables": [_table(data, part) for group in groups for part in _parts(group)],
        "plots": [plot for group in groups if (plot := _plot(data, group))],
        "comparisons": [group for group in groups if group["differences"]],
        "heat": _heat(data, tasks, marks),
        "marked": {mark["name"]: mark for mark in marks},
        "layered": [task for task in tasks if task["name"] in data.get("layers", {})],
        "trained": any({"base", "own", "steps", "expert_seconds"} & set(e) for e in experts),
        "carded": any({"health", "made", "nearest"} & set(e) for e in experts),
        "numbered": {e["name"]: i for i, e in enumerate(experts, 1)},
        "mean_gate_share": sum(gate_shares) / len(gate_shares) if gate_shares else None,
        "recipe": list(_flat(data.get("recipe", {}))),
        "made": list(_flat(data.get("made", {}))),
    }


def _headline(data: dict[str, Any], group: dict[str, Any]) -> dict[str, Any] | None:
    """The share of the oracle's gain that routing recovered, with the means it comes from."""
    kinds = ("base", "router", "oracle")
    found: dict[str, dict[str, Any]] = {
        kind: next((s for s in data["systems"] if s["kind"] == kind), {}) for kind in kinds
    }
    means = {kind: s.get("groups", {}).get(group["key"]) for kind, s in found.items()}
    if not means["router"]:
        return None
    pair = (found["router"]["name"], found["base"].get("name"))
    return {
        **means,
        "name": pair[0],
        "tasks": len(group["tasks"]),
        "held_out": group["key"] in HELD_OUT,
        "label": group["label"],
        "known": group["key"] in GROUPS,
        "recovered": data.get("recovered", {}).get(group["key"]),
        "open": any(d["verdict"] == "open" and (d["a"], d["b"]) == pair for d in group["differences"]),
    }


def _parts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group's tasks in parts of at most `TASKS_ACROSS`, as even as possible: more columns don't fit on a screen."""
    tasks = group["tasks"]
    count = -(-len(tasks) // TASKS_ACROSS)
    width = -(-len(tasks) // count)
    starts = range(0, len(tasks), width)
    return [
        {**group, "of": len(tasks), "tasks": tasks[s : s + width], "first": s + 1 if count > 1 else None}
        for s in starts
    ]


def _table(data: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """The table of (a part of) a group: a row for each system with a score there, the group's mean first.

    A cell is `best` if only the oracle's is higher in its column.
    """
    rows = []
    for system in data["systems"]:
        cells = [_cell(system.get("groups", {}).get(group["key"]), mean=True)]
        cells += [_cell(system["scores"].get(t["name"]), mean=False) for t in group["tasks"]]
        if any(cell["value"] is not None for cell in cells):
            rows.append({**system, "cells": cells})
    for column in zip(*(row["cells"] for row in rows if row["kind"] != "oracle"), strict=True):
        values = [cell["value"] for cell in column if cell["value"] is not None]
        for cell in column:
            # With one rival, or all alike, there is no best to point out.
            best = cell["value"] is not None and cell["value"] >= max(values) - 1e-9
            cell["best"] = best and min(values) < max(values) - 1e-9
    lead = next((row for row in rows if row["kind"] == "router"), None)
    label = group["label"]
    if group["first"] is not None:
        label += f": {group['first']} to {group['first'] + len(group['tasks']) - 1} of {group['of']}"
    return {"label": label, "of": group["of"], "tasks": group["tasks"], "rows": rows, "lead": lead}


def _cell(score: dict[str, Any] | None, *, mean: bool) -> dict[str, Any]:
    s = score or {}
    return {"value": s.get("mean"), "low": s.get("low"), "high": s.get("high"), "mean": mean, "best": False}


def _plot(data: dict[str, Any], group: dict[str, Any]) -> dict[str, Any] | None:
    """Dots and intervals of one group's means in percent of the axis, which runs from 0 to a round value."""
    scores = [(s, s["groups"][group["key"]]) for s in data["systems"] if group["key"] in s.get("groups", {})]
    if not scores:
        return None
    # One axis for all groups, so that they can be compared.
    highest = max(g["high"] for s in data["systems"] for g in s.get("groups", {}).values())
    end = max(1, math.ceil(round(highest * 10, 6))) / 10
    step = 0.1 if end <= 0.5 else 0.2
    base = next((score["mean"] for s, score in scores if s["kind"] == "base"), None)
    return {
        "label": group["label"],
        "key": group["key"],
        "ticks": [(step * i, 100 * step * i / end) for i in range(int(end / step + 1e-9) + 1)],
        "base": None if base is None else 100 * base / end,
        "rows": [
            {
                "name": s["name"],
                "kind": s["kind"],
                **g,
                **{f"x_{k}": 100 * g[k] / end for k in ("mean", "low", "high")},
            }
            for s, g in scores
        ],
    }


def _differences(data: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """One group's differences, each with the verdict of its interval: "better", "worse" or "open"."""
    return [
        {**row, "verdict": "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "open"}
        for row in data.get("comparisons", [])
        if row["group"] == group
    ]


def _heat(
    data: dict[str, Any], tasks: list[dict[str, Any]], marks: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Routing shares, task × expert, shaded relative to the largest of all."""
    shares = data.get("shares") or {}
    columns = [mark for mark in marks if any(mark["name"] in row for row in shares.values())]
    if not columns:
        return None
    highest = max(share for row in shares.values() for share in row.values()) or 1.0
    trained = {(e["name"], t) for e in data.get("experts", []) for t in (e.get("task"), e.get("spec")) if t}
    rows: list[dict[str, Any]] = []
    for task in tasks:
        if (row := shares.get(task["name"])) is None:
            continue
        cells = [
            {
                "share": row.get(mark["name"]),
                "shade": (row.get(mark["name"]) or 0) / highest,
                "own": any((mark["name"], t) in trained for t in (task["name"], task.get("spec"))),
            }
            for mark in columns
        ]
        rows.append({"task": task, "cells": cells, "effective": effective_number(row.values())})
    return {"columns": columns, "rows": rows, "own": any(c["own"] for r in rows for c in r["cells"])}


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as ("gate.learning_rate", "0.005") pairs."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
