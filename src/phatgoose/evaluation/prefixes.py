"""Prompts that begin alike: which beginnings are worth a forward of their own, so that several prompts go on from them.

A task's instructions, its examples or the passage of several questions are the same tokens in many of its prompts. Their keys and
values don't depend on what follows, as attention is causal and routers choose token by token (`continuations.reads_on` knows where
that isn't so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LEVELS = 4
"""Most beginnings of beginnings, whose caches live together; the tasks of BIG-bench and T0 have no use for more."""
TOGETHER = 1024
"""Most prompts whose beginnings are compared, so that thousands of nested ones cost no more than others."""


@dataclass(eq=False)
class Prefix:
    """The first `length` tokens that some prompts share."""

    length: int
    rows: list[int] = field(default_factory=list)
    """Prompts that go on from here by themselves."""
    parts: list[Prefix] = field(default_factory=list)
    """Longer beginnings, of other prompts that begin so."""

    def first(self) -> int:
        """One of the prompts that begin so."""
        return self.rows[0] if self.rows else self.parts[0].first()


def prefixes(prompts: Sequence[Sequence[int]], least: int) -> Prefix:
    """The beginnings, as a tree under an empty one; every prompt is in one place.

    Each is shorter than its prompts, so that all have a token of their own to read, and saves more than `least` tokens over reading
    on from the one above: (prompts − 1) · (tokens beyond it).
    """
    order = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    common = [_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    root = Prefix(0)
    todo = [(low, min(low + TOGETHER, len(order)), root, 0) for low in range(0, len(order), TOGETHER)]
    while todo:
        low, high, above, level = todo.pop()
        if high - low == 1 or level == LEVELS:
            above.rows += order[low:high]
            continue
        shared = min(common[low : high - 1])
        length = min(shared, len(prompts[order[low]]) - 1)  # the shortest of them comes first
        if (high - low - 1) * (length - above.length) > least:
            above.parts.append(Prefix(length))
            above, level = above.parts[-1], level + 1
        ends = [low, *(n + 1 for n in range(low, high - 1) if common[n] == shared), high]
        todo += [(start, end, above, level) for start, end in pairwise(ends)]
    return root


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))
