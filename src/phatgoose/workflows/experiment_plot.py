"""An experiment's results as one SVG: per suite a row for each system, its mean and 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from phatgoose.workflows.systems import BASE, MAIN

LABEL, WIDTH, ROW, HEAD, MARGIN = 190, 460, 20, 44, 60


def plot(results: Mapping[str, Any]) -> str:
    """The SVG's text. Systems stand by their mean, the best on top; a dashed line marks the base's."""
    parts, y = [], 12
    for name, suite in results["suites"].items():
        systems = {s: v for s, v in suite["systems"].items() if "mean" in v}
        if systems:
            panel, y = _panel(name, len(suite["common_tasks"]), systems, y)
            parts += panel
    total = LABEL + WIDTH + MARGIN + 60
    style = (
        "text{font:12px system-ui,sans-serif;fill:#333}.head{font-weight:600;font-size:14px}"
        ".axis{stroke:#ccc;stroke-width:1}.base{stroke:#999;stroke-dasharray:4 3}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {y}" width="{total}" height="{y}" role="img">'
        f'<title>Mean scores with 95 % intervals</title><style>{style}</style><rect width="{total}" height="{y}" fill="#fff"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _panel(name: str, tasks: int, systems: Mapping[str, Any], top: int) -> tuple[list[str], int]:
    low = min(v["low"] for v in systems.values())
    high = max(v["high"] for v in systems.values())
    pad = max(0.01, (high - low) * 0.05)
    low, high = max(0.0, low - pad), min(1.0, high + pad)
    first, last = top + HEAD, top + HEAD + ROW * len(systems)

    def x(value: float) -> float:
        return round(LABEL + WIDTH * (value - low) / (high - low), 1)

    parts = [f'<text class="head" x="0" y="{top + 16}">{escape(name)} ({tasks} tasks)</text>']
    for step in range(5):
        value = low + (high - low) * step / 4
        parts.append(f'<line class="axis" x1="{x(value)}" x2="{x(value)}" y1="{first - 6}" y2="{last}"/>')
        parts.append(f'<text x="{x(value)}" y="{first - 10}" text-anchor="middle">{value:.2f}</text>')
    if BASE in systems:
        base = x(systems[BASE]["mean"])
        parts.append(f'<line class="base" x1="{base}" x2="{base}" y1="{first - 6}" y2="{last}"/>')
    for place, (system, v) in enumerate(sorted(systems.items(), key=lambda item: -item[1]["mean"])):
        y = first + ROW * place + ROW // 2
        colour = "#c2410c" if system == MAIN else "#777" if system == BASE else "#1d4ed8"
        weight = ' font-weight="600"' if system == MAIN else ""
        parts.append(f'<text x="{LABEL - 8}" y="{y + 4}" text-anchor="end"{weight}>{escape(system)}</text>')
        parts.append(
            f'<line x1="{x(v["low"])}" x2="{x(v["high"])}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(v["mean"])}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{LABEL + WIDTH + 8}" y="{y + 4}">{v["mean"]:.3f}</text>')
    return parts, last + 24
