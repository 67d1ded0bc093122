"""Experts switched on and off, for each row of a batch separately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.routers.constant import Single, Uniform
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, ByScores, Candidates, Router, Setup


@dataclass(eq=False)
class Switches:
    """Which experts may act now. Whoever runs a batch sets `allowed` before it: bool [rows, experts of the
    pool], or None for all.

    If the model repeats its rows (beams), each row's switches are repeated with it.
    """

    allowed: Tensor | None = None


@dataclass(frozen=True)
class Masked(Router):
    """`router`, on each row as if the pool had been made of that row's experts only.

    For routers that compare scores (`ByScores`), Single and Uniform. The choices of others depend on the whole
    pool: they are refused.
    """

    router: Router
    """The router that chooses among the experts that are on."""
    switches: Switches = field(default_factory=Switches)
    """Which experts are on; may be changed between two calls of the model."""

    by_token = False  # switches are a row's

    @property
    def offers_null(self) -> bool:  # type: ignore[override]  # the contract has a class attribute
        return self.router.offers_null

    @property
    def reads(self) -> str:  # type: ignore[override]  # the contract has a class attribute
        return self.router.reads

    @property
    def remembers(self) -> bool:  # type: ignore[override]  # the contract has a class attribute
        return self.router.remembers

    def check(self, names: Sequence[str]) -> None:
        self.router.check(names)

    def prepared(self, setup: Setup) -> Router:
        return replace(self, router=self.router.prepared(setup))

    def bind(self, candidates: Candidates) -> BoundRouter:
        inner = self.router.bind(candidates)
        if isinstance(inner, ByScores):
            if not isinstance(getattr(inner, "top_k", None), int):
                raise RoutingError(
                    f"{type(inner).__name__} doesn't say how many experts act: call super().__init__(top_k) "
                    "in its __init__."
                )
            if self.switches.allowed is not None:
                inner.check_on(self.switches.allowed)
        elif inner.acts and not isinstance(self.router, Single | Uniform):
            name = type(getattr(self.router, "settings", self.router)).__name__
            raise RoutingError(
                f"{name} doesn't choose by scores: experts can't be switched off one by one. Make a pool without "
                "them instead."
            )
        return _Masked(inner, candidates, self.switches, isinstance(self.router, Uniform))

    def describe(self) -> dict[str, Any]:
        return self.router.describe()


class _Masked(BoundRouter):
    """A masked router at one module. The weight of `uniform` is shared by the experts that are on."""

    def __init__(self, inner: BoundRouter, candidates: Candidates, switches: Switches, uniform: bool):
        self.inner, self.switches, self.names = inner, switches, candidates.names
        self.uniform, self.acts = uniform, inner.acts
        self.needs_reference, self.needs_plain = inner.needs_reference, inner.needs_plain
        self.members = torch.tensor(candidates.members)
        absent = set(range(len(candidates.names))) - set(candidates.members)
        self.absent = torch.tensor(sorted(absent), dtype=torch.long)

    @property
    def by_gates(self) -> tuple[Tensor, int] | None:  # type: ignore[override]  # it changes with the switches
        return self.inner.by_gates if self.switches.allowed is None else None

    def observe(self, u: Tensor, ops: Backend) -> None:
        self.inner.observe(u, ops)

    def observe_plain(self, u: Tensor, ops: Backend) -> None:
        self.inner.observe_plain(u, ops)

    def check_observed(self) -> None:
        self.inner.check_observed()

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        if self.switches.allowed is None or not self.acts:
            return self.inner(u, context, ops)
        if isinstance(self.inner, ByScores) and self.inner.of_whole_pool:
            return self.inner(u, self._switched(context), ops)
        if isinstance(self.inner, ByScores):
            scores = self.scores(u, context, ops)
            assert scores is not None
            chosen, weights = ops.choose(scores, self.inner.top_k)
            off = scores.gather(1, chosen) == -torch.inf
        else:
            allowed, experts = self.allowed(context, u.device)
            chosen, weights = self.inner(u, context, ops)
            if self.uniform:
                weights = (1.0 / experts.clamp(min=1)).to(weights.dtype)[:, None].expand_as(weights)
            off = (chosen < 0) | ~allowed.gather(1, chosen.clamp(min=0))
        return chosen.masked_fill(off, -1), weights.masked_fill(off, 0.0)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor | None:
        if self.switches.allowed is None or not isinstance(self.inner, ByScores):
            return self.inner.scores(u, context, ops)
        if self.inner.of_whole_pool:
            return self.inner.scores(u, self._switched(context), ops)
        allowed, _ = self.allowed(context, u.device)
        scores = self.inner.scores(u, replace(context, allowed=allowed), ops)
        return scores.masked_fill(~allowed, -torch.inf)

    def allowed(self, context: RoutingContext, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each token: which candidates are on, bool [N, candidates], and how many experts are, int64 [N]."""
        on = self.switches.allowed
        assert on is not None
        if context.picked is not None:
            return self._by_candidate(context.spread(on.to(device)[:, None, :]))
        self._check_fits(on, context)
        on = on.to(device).repeat_interleave(context.rows // on.shape[0], dim=0)
        allowed, number = self._by_candidate(on)
        return allowed.repeat_interleave(context.length, dim=0), number.repeat_interleave(context.length)

    def _switched(self, context: RoutingContext) -> RoutingContext:
        on = self.switches.allowed
        assert on is not None
        if context.picked is None:
            self._check_fits(on, context)
        return replace(context, on=on)

    def _check_fits(self, on: Tensor, context: RoutingContext) -> None:
        if on.ndim != 2 or on.shape[1] != len(self.names) or not on.shape[0] or context.rows % on.shape[0]:
            raise RoutingError(
                f"experts are switched by a table of {list(on.shape)}, and {context.path} saw {context.rows} "
                f"rows of a pool of {len(self.names)}: expected one row for each row of the batch, one "
                "column for each expert."
            )

    def _by_candidate(self, on: Tensor) -> tuple[Tensor, Tensor]:
        """Which candidates are on for each row of switches, and how many experts of the pool are."""
        allowed = on[:, self.members.clamp(min=0)]
        # The null candidate stands for experts that are on and have nothing at this module. Without any it
        # isn't offered.
        null = on[:, self.absent].any(1, keepdim=True)
        return torch.where((self.members < 0).to(on.device), null, allowed), on.sum(1)
