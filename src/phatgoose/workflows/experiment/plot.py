"""An experiment's results as one SVG: for each suite, every system's mean and interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from phatgoose.workflows.experiment.markdown import guessing
from phatgoose.workflows.experiment.systems import BASE, MAIN, MULTITASK, OTHER, TOLD

LABEL, WIDTH, VALUE, ROW, HEAD, LEGEND = 190, 300, 60, 20, 44, 32
COLOURS = {
    "PHATGOOSE": "#c2410c",
    "routers, merges, controls": "#1d4ed8",
    "told the task, or trained on all data": "#7e22ce",
    "base": "#777",
}


def plot(results: Mapping[str, Any]) -> str:
    """The SVG's text, two suites side by side, systems sorted by their mean.

    A dashed line marks the base's mean, a dotted one what guessing scores.
    """
    suites = [(n, s) for n, s in results["suites"].items() if any("mean" in v for v in s["systems"].values())]
    across = min(2, max(1, len(suites)))
    column = LABEL + WIDTH + VALUE
    parts, y = [_legend()], LEGEND
    for start in range(0, len(suites), across):
        ends = []
        for place, (name, suite) in enumerate(suites[start : start + across]):
            panel, end = _panel(name, suite, place * column, y)
            parts += panel
            ends.append(end)
        y = max(ends)
    total = max(across * column, 2 * column - LABEL)
    style = (
        "text{font:12px system-ui,sans-serif;fill:#333}.head{font-weight:600;font-size:14px}"
        ".axis{stroke:#ddd;stroke-width:1}.base{stroke:#777;stroke-dasharray:5 3}"
        ".guess{stroke:#777;stroke-dasharray:1 3;stroke-width:2}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {y}" width="{total}" height="{y}" role="img">'
        f"<title>Mean scores with 95 % intervals</title><style>{style}</style>"
        f'<rect width="{total}" height="{y}" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def _legend() -> str:
    marks = [
        f'<tspan fill="{c}">{"- -" if kind == "base" else "■"}</tspan> {escape(kind)}'
        for kind, c in COLOURS.items()
    ]
    return f'<text x="4" y="20">{"&#160;&#160; ".join([*marks, "· · guessing"])}</text>'


def _kind(system: str) -> str:
    if system == MAIN:
        return "PHATGOOSE"
    if system == BASE:
        return "base"
    told = system in TOLD or system.partition(":")[0] in (MULTITASK, OTHER)
    return "told the task, or trained on all data" if told else "routers, merges, controls"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], at most five steps; the interval lies in [0, 1] and is at least 0.01 wide."""
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if high - low <= 5 * s)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _panel(name: str, suite: Mapping[str, Any], left: int, top: int) -> tuple[list[str], int]:
    systems = {s: v for s, v in suite["systems"].items() if "mean" in v}
    guess = guessing(suite)
    lowest = min(guess, *(v["low"] for v in systems.values()))
    highest = max(guess, *(v["high"] for v in systems.values()))
    pad = max(0.01, (highest - lowest) * 0.05)
    low, high = max(0.0, lowest - pad), min(1.0, highest + pad)
    first, last = top + HEAD, top + HEAD + ROW * len(systems)

    def x(value: float) -> float:
        return round(left + LABEL + WIDTH * (value - low) / (high - low), 1)

    head = f"{name} ({len(suite['common_tasks'])} tasks)"
    parts = [f'<text class="head" x="{left}" y="{top + 16}">{escape(head)}</text>']
    for value in _ticks(low, high):
        parts.append(f'<line class="axis" x1="{x(value)}" x2="{x(value)}" y1="{first - 6}" y2="{last}"/>')
        parts.append(f'<text x="{x(value)}" y="{first - 10}" text-anchor="middle">{value:.2f}</text>')
    lines = {"base": systems[BASE]["mean"] if BASE in systems else None, "guess": guess}
    for kind, at in lines.items():
        if at is not None:
            parts.append(f'<line class="{kind}" x1="{x(at)}" x2="{x(at)}" y1="{first - 6}" y2="{last}"/>')
    for place, (system, v) in enumerate(sorted(systems.items(), key=lambda item: -item[1]["mean"])):
        y, colour = first + ROW * place + ROW // 2, COLOURS[_kind(system)]
        weight = ' font-weight="600"' if system == MAIN else ""
        parts.append(
            f'<text x="{left + LABEL - 8}" y="{y + 4}" text-anchor="end"{weight}>{escape(system)}</text>'
        )
        parts.append(
            f'<line x1="{x(v["low"])}" x2="{x(v["high"])}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(v["mean"])}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + LABEL + WIDTH + 8}" y="{y + 4}">{v["mean"]:.3f}</text>')
    return parts, last + 24
