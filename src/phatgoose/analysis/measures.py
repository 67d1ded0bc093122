"""Numbers that sum up routing: how much each expert acted, and on how many experts a routing really rests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from phatgoose.models.trace import Trace


def expert_shares(trace: Trace) -> dict[str, float]:
    """Share of the routing weight each expert got, over all tokens and modules of a trace; every decision counts alike.

    They sum to 1 less what went to no expert; all are 0 for an empty trace.
    """
    total, tokens = torch.zeros(len(trace.experts), dtype=torch.float64), 0
    for c in trace.choices:
        index, weight = c.experts.long().reshape(-1), c.weights.double().reshape(-1)
        total.index_add_(0, index[index >= 0], weight[index >= 0])
        tokens += len(c.rows)
    return dict(zip(trace.experts, (total / max(tokens, 1)).tolist(), strict=True))


def effective_number(shares: Iterable[float]) -> float:
    """exp(entropy) of `shares` scaled to sum to 1: 1 if one expert does all, E if E experts act alike, 0 if none acts."""
    positive = [s for s in shares if s > 0]
    total = math.fsum(positive)
    return math.exp(-math.fsum(s / total * math.log(s / total) for s in positive)) if positive else 0.0


def layer_and_kind(modules: Sequence[str]) -> list[tuple[int | None, str]]:
    """(number of the block, what is after it) for each module path, e.g. (3, "self_attn.q_proj").

    Where blocks of several stacks are in `modules`, the kind starts with its stack ("decoder SelfAttention.q"). A path
    without a number has no block and is its own kind.
    """
    split = [_split(path) for path in modules]
    several = len({stack for stack, layer, _ in split if layer is not None}) > 1
    return [
        (layer, f"{stack.split('.')[0]} {rest}" if several and layer is not None else rest)
        for stack, layer, rest in split
    ]


def _split(path: str) -> tuple[str, int | None, str]:
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and place + 1 < len(parts):
            return ".".join(parts[:place]), int(part), ".".join(parts[place + 1 :])
    return "", None, path
