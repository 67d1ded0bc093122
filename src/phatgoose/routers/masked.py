"""Experts switched on and off, for each row of a batch by itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.routers.constant import Single, Uniform
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates, Router, Setup


@dataclass(eq=False)
class Switches:
    """Which experts may act now. Whoever runs a batch sets `allowed` before it: bool [rows, experts of the pool], or None for all.

    Where the model repeats its rows (beams), each row's switches are repeated with it.
    """

    allowed: Tensor | None = None


@dataclass(frozen=True)
class Masked(Router):
    """`router`, on each row as if the pool had been made of that row's experts only.

    For routers that compare scores, Single and Uniform; the others' choices depend on the whole pool and are refused.
    """

    router: Router
    """The router that chooses among the experts that are on."""
    switches: Switches = field(default_factory=Switches)
    """Who is on; may be changed between two calls of the model."""

    by_token = False  # switches are a row's

    @property
    def offers_null(self) -> bool:  # type: ignore[override]
        return self.router.offers_null

    @property
    def reads(self) -> str:  # type: ignore[override]
        return self.router.reads

    def check(self, names: Any) -> None:
        self.router.check(names)

    def prepared(self, setup: Setup) -> Router:
        return replace(self, router=self.router.prepared(setup))

    def bind(self, candidates: Candidates) -> BoundRouter:
        inner = self.router.bind(candidates)
        by_scores = type(inner).scores is not BoundRouter.scores
        if not by_scores and not isinstance(self.router, Single | Uniform):
            raise RoutingError(
                f"{type(self.router).__name__} doesn't choose by scores: experts can't be switched off one by one. Make a pool "
                "without them instead."
            )
        return _Masked(inner, candidates, self)

    def describe(self) -> dict[str, Any]:
        return self.router.describe()


class _Masked(BoundRouter):
    def __init__(self, inner: BoundRouter, candidates: Candidates, settings: Masked):
        self.inner, self.settings, self.names = inner, settings, candidates.names
        self.needs_reference = inner.needs_reference
        self.members = torch.tensor(candidates.members)
        absent = set(range(len(candidates.names))) - set(candidates.members)
        self.absent = torch.tensor(sorted(absent), dtype=torch.long)

    @property
    def by_gates(self) -> tuple[Tensor, int] | None:  # type: ignore[override]  # it changes with the switches
        return self.inner.by_gates if self.settings.switches.allowed is None else None

    def observe(self, u: Tensor, ops: Backend) -> None:
        self.inner.observe(u, ops)

    def check_observed(self) -> None:
        self.inner.check_observed()

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        if self.settings.switches.allowed is None:
            return self.inner(u, context, ops)
        allowed, experts = self._allowed(context, u.device)
        scores = self._scores(u, context, ops, allowed)
        if scores is None:
            chosen, weights = self.inner(u, context, ops)
            off = (chosen < 0) | ~allowed.gather(1, chosen.clamp(min=0))
            if isinstance(self.settings.router, Uniform):
                weights = (1.0 / experts.clamp(min=1)).to(weights.dtype)[:, None].expand_as(weights)
        else:
            chosen, weights = ops.choose(scores, self.inner.top_k)  # type: ignore[attr-defined]
            off = scores.gather(1, chosen) == -torch.inf
        return chosen.masked_fill(off, -1), weights.masked_fill(off, 0.0)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor | None:
        if self.settings.switches.allowed is None:
            return self.inner.scores(u, context, ops)
        return self._scores(u, context, ops, self._allowed(context, u.device)[0])

    def _scores(self, u: Tensor, context: RoutingContext, ops: Backend, allowed: Tensor) -> Tensor | None:
        scores = self.inner.scores(u, replace(context, allowed=allowed), ops)
        return None if scores is None else scores.masked_fill(~allowed, -torch.inf)

    def _allowed(self, context: RoutingContext, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which candidates may be chosen on each token: bool [N, candidates], and how many of all experts are on: int64 [N]."""
        on = self.settings.switches.allowed
        assert on is not None
        if context.picked is not None:
            return self._of(context.spread(on.to(device)[:, None, :]))
        if on.ndim != 2 or on.shape[1] != len(self.names) or not on.shape[0] or context.rows % on.shape[0]:
            raise RoutingError(
                f"experts are switched by a table of {list(on.shape)}, and {context.path} saw {context.rows} rows of a pool of "
                f"{len(self.names)}: expected one row for each row of the batch, one column for each expert."
            )
        on = on.to(device).repeat_interleave(context.rows // on.shape[0], dim=0)
        allowed, number = self._of(on)
        return allowed.repeat_interleave(context.length, dim=0), number.repeat_interleave(context.length)

    def _of(self, on: Tensor) -> tuple[Tensor, Tensor]:
        """Of switches, one row for each token or sequence: which candidates are on, and how many of all experts."""
        allowed = on[:, self.members.clamp(min=0)]
        # Nothing is offered in place of an expert only where one that is on has nothing at this module.
        null = on[:, self.absent].any(1, keepdim=True)
        return torch.where((self.members < 0).to(on.device), null, allowed), on.sum(1)
