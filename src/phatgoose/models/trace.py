"""Record which experts act on which tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.models.base import Base
from phatgoose.models.routed import routing_of
from phatgoose.routers.context import RoutingContext


@dataclass(frozen=True, eq=False)
class Choices:
    """The choices of one module in one call, padding left out; N real tokens, k choices.

    experts: int16 [N, k], indices into Trace.experts (−1: none). weights: float16 [N, k].
    rows and positions: int64 [N], the sequence of the batch and the place in it. ids: int64 [N] or None.
    """

    path: str
    experts: Tensor
    weights: Tensor
    rows: Tensor
    positions: Tensor
    ids: Tensor | None


@dataclass(eq=False)
class Trace:
    """Everything recorded, in order of the calls."""

    experts: tuple[str, ...]
    choices: list[Choices] = field(default_factory=list)

    def shares(self) -> dict[str, Tensor]:
        """Share of the routing weight each expert got, per module: float64 [experts] summing to at most 1."""
        sums: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        for c in self.choices:
            total = sums.setdefault(c.path, torch.zeros(len(self.experts), dtype=torch.float64))
            index, weight = c.experts.long().reshape(-1), c.weights.double().reshape(-1)
            total.index_add_(0, index[index >= 0], weight[index >= 0])
            tokens[c.path] = tokens.get(c.path, 0) + len(c.rows)
        return {path: total / max(tokens[path], 1) for path, total in sums.items()}

    def record(
        self, context: RoutingContext, members: tuple[int, ...], chosen: Tensor, weights: Tensor
    ) -> None:
        tokens = context.tokens()
        real = tokens.real.reshape(-1)
        index = torch.tensor((*members, -1), device=chosen.device)  # a choice of −1 reads the last entry
        rows = (
            torch.arange(context.rows, device=chosen.device)[:, None].expand(-1, context.length).reshape(-1)
        )
        self.choices.append(
            Choices(
                context.path,
                index[chosen][real].to("cpu", torch.int16),
                weights[real].to("cpu", torch.float16),
                rows[real].cpu(),
                tokens.positions.reshape(-1)[real].cpu(),
                None if tokens.ids is None else tokens.ids.reshape(-1)[real].cpu(),
            )
        )


@contextlib.contextmanager
def trace(model: Base | PreTrainedModel) -> Iterator[Trace]:
    """Records the routing of every call of `model` inside the with block.

    Raises:
        RoutingError: if no routing is attached, or a trace is already running.
    """
    routing = routing_of(model)
    if routing is None:
        raise RoutingError("there is nothing to trace: attach routing first, with route(model, pool).")
    if routing.recorder is not None:
        raise RoutingError("a trace of this model is already running.")
    recorded = Trace(routing.pool.names)
    routing.recorder = recorded.record
    try:
        yield recorded
    finally:
        routing.recorder = None
