"""Routers that score every token by one stored vector per expert and module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.ops.reference import standardise
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates, Router


@dataclass(frozen=True)
class PHATGOOSE(Router):
    """Top-k by standardised gates (Muqeeth et al. 2024, arXiv 2402.05859): score_e = v̄_eᵀū/√d, softmax over the top k.

    Needs a trained gate per expert and module. At a module that only some of the pool's experts adapt, a null candidate
    (score 0, no update) stands for the others; without it the few that do adapt it would act on every token.
    """

    top_k: int = 2
    """How many experts act on each token; the paper's value is 2. More than the pool has means all of them."""

    offers_null = True

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise RoutingError(f"top_k is {self.top_k!r}, expected a whole number of at least 1.")

    def bind(self, candidates: Candidates) -> BoundRouter:
        missing = [
            candidates.names[m]
            for m, g in zip(candidates.members, candidates.gates, strict=True)
            if m >= 0 and g is None
        ]
        if missing:
            raise RoutingError(
                f"expert {missing[0]!r} has no gates, which PHATGOOSE needs: train them with `phatgoose gate` (or train_gate), "
                "or choose a router that needs none."
            )
        vectors = [torch.zeros(candidates.d_in) if g is None else g for g in candidates.gates]
        # In float64 until the very end: the mean of v̄ must be zero to the last bit that float32 has.
        return _ByVectors(standardise(torch.stack(vectors).double()).float(), self.top_k)


class _ByVectors(BoundRouter):
    def __init__(self, gates: Tensor, top_k: int):
        self.gates, self.top_k = gates, top_k

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        if self.gates.device != u.device:
            self.gates = self.gates.to(u.device)
        return ops.choose(ops.gate_scores(u, self.gates), self.top_k)
