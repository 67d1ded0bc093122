"""The plot of the results: ratios to the base by the pool's size, one panel a step, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLOURS = {"cpu": "#0a7d5a", "torch": "#3465a4", "dense": "#b8860b", "arrow": "#a40000", "gander": "#7a3b9a"}
NAMES = {
    "cpu": "compiled kernel",
    "torch": "torch",
    "dense": "dense formula",
    "arrow": "PEFT Arrow",
    "gander": "Gander",
}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 300, 260, 46, 56, 40, 20


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of `models` rows, both axes logarithmic."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    sizes = sorted({row["experts"] for row in rows})
    top = max(max(row["ratio"].values()) for row in rows) * 1.1
    total = len(steps) * (WIDTH + GAP) + LEFT
    text = "".join(
        _panel(step, [r for r in rows if r["step"] == step], sizes, top, LEFT + i * (WIDTH + GAP))
        for i, step in enumerate(steps)
    )
    ways = list(dict.fromkeys(n for row in rows for n in row["ratio"]))
    legend = "".join(
        f'<text x="{LEFT + 130 * i}" y="16" fill="{COLOURS[n]}">● {NAMES[n]}</text>'
        for i, n in enumerate(ways)
    )
    legend += f'<text x="{LEFT + 130 * len(ways)}" y="16" fill="#888">– – floor</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HEIGHT + TOP + BOTTOM}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>{legend}{text}</svg>\n'
    )


def _panel(
    step: str, rows: Sequence[Mapping[str, Any]], sizes: Sequence[int], top: float, left: float
) -> str:
    def x(experts: float) -> float:
        low, high = math.log(sizes[0]), math.log(max(sizes[-1], sizes[0] * 2))
        return left + 12 + (WIDTH - 24) * (math.log(experts) - low) / (high - low)

    def y(ratio: float) -> float:
        return TOP + HEIGHT * (1 - math.log(max(ratio, 1)) / math.log(top))

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{step}: time ÷ base</text>']
    for mark in _marks(top):
        parts.append(f'<path d="M{left} {y(mark):.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y(mark) + 4:.1f}" text-anchor="end" fill="#555">{mark:g}</text>'
        )
    for size in sizes:
        parts.append(
            f'<text x="{x(size):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle" fill="#555">{size}</text>'
        )
    parts.append(
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle" fill="#555">experts</text>'
    )
    floor = "byte_floor" if step.startswith("decode") else "flop_floor"
    parts.append(
        _line([(x(r["experts"]), y(r[floor])) for r in rows], "#888", 'stroke-dasharray="4 4"', dots=False)
    )
    for name in dict.fromkeys(n for row in rows for n in row["ratio"]):
        points = [(x(r["experts"]), y(r["ratio"][name])) for r in rows if name in r["ratio"]]
        parts.append(_line(points, COLOURS[name], 'stroke-width="2"'))
    return "".join(parts)


def _marks(top: float) -> Iterator[float]:
    for mark in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200):
        if mark <= top:
            yield mark


def _line(points: Sequence[tuple[float, float]], colour: str, more: str, dots: bool = True) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    circles = (
        "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in points)
        if dots
        else ""
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" {more}/>{circles}'
