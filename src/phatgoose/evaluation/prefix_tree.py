"""Which common prefixes of prompts are worth a forward of their own, as a tree.

A task's instructions, its examples, or the passage of several questions are the same tokens in many of its
prompts. Their keys and values don't depend on what follows, since attention is causal and routers choose token
by token. (`prefill.can_prefill_in_parts` knows where that isn't so.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MAX_DEPTH = 4
"""Most prefixes within prefixes, whose caches live at the same time. The tasks of BIG-bench and T0 have no use
for more."""
MAX_COMPARED = 1024
"""Most prompts that are compared with each other, so that thousands of nested ones cost no more than others."""


@dataclass(eq=False)
class PrefixNode:
    """The first `length` tokens that some prompts share."""

    length: int
    rows: list[int] = field(default_factory=list)
    """Prompts that continue from here by themselves."""
    children: list[PrefixNode] = field(default_factory=list)
    """Longer prefixes, of other prompts that begin with this one."""

    def any_row(self) -> int:
        """One of the prompts that begin with this prefix."""
        return self.rows[0] if self.rows else self.children[0].any_row()


def build_prefix_tree(prompts: Sequence[Sequence[int]], min_saved: int) -> PrefixNode:
    """The tree of prefixes under an empty one. Every prompt is in exactly one node.

    A prefix is shorter than each of its prompts, so that all have a token of their own to read. Reading it
    once must save more than `min_saved` tokens compared with its parent: (prompts − 1) · (tokens beyond the parent).
    """
    # Sorted, so that prompts with a common prefix are neighbours; common[i] is what neighbours i and i + 1 share.
    order = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    common = [_common_length(prompts[a], prompts[b]) for a, b in pairwise(order)]
    root = PrefixNode(0)
    todo = [(low, min(low + MAX_COMPARED, len(order)), root, 0) for low in range(0, len(order), MAX_COMPARED)]
    while todo:
        low, high, parent, depth = todo.pop()
        if high - low == 1 or depth == MAX_DEPTH:
            parent.rows += order[low:high]
            continue
        shared = min(common[low : high - 1])
        length = min(shared, len(prompts[order[low]]) - 1)  # the shortest prompt of these is the first
        if (high - low - 1) * (length - parent.length) > min_saved:
            parent.children.append(PrefixNode(length))
            parent, depth = parent.children[-1], depth + 1
        # Split where neighbours share no more than all of them do, and look at each part by itself.
        ends = [low, *(n + 1 for n in range(low, high - 1) if common[n] == shared), high]
        todo += [(start, end, parent, depth) for start, end in pairwise(ends)]
    return root


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return min(len(a), len(b))
