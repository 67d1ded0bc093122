"""Routers that score every token by one stored vector per expert and module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.ops.reference import standardise
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates, Prepared, Router, Setup
from phatgoose.routers.weights import Comparable, at_least_one

UNGATED = ("refuse", "weights")


@dataclass(frozen=True)
class PHATGOOSE(Router):
    """Top-k by standardised gates (Muqeeth et al. 2024, arXiv 2402.05859): score_e = v̄_eᵀū/√d, softmax over the top k.

    Needs a trained gate per expert and module. At a module that only some of the pool's experts adapt, a null candidate
    (score 0, no update) stands for the others; without it the few that do adapt it would act on every token.
    """

    top_k: int = 2
    """How many experts act on each token; the paper's value is 2. More than the pool has means all of them."""
    ungated: Literal["refuse", "weights"] = "refuse"
    """What to do about experts without gates: "refuse" them by name, or let their "weights" score them. Then all scores at a
    module with such an expert are standardised on reference text (docs/method.md, "Experts without gates")."""

    offers_null = True

    def __post_init__(self) -> None:
        at_least_one(self, "top_k")
        if self.ungated not in UNGATED:
            raise RoutingError(f"ungated is {self.ungated!r}, expected one of: {', '.join(UNGATED)}.")

    def bind(self, candidates: Candidates) -> BoundRouter:
        missing = [
            candidates.names[m]
            for m, g in zip(candidates.members, candidates.gates, strict=True)
            if m >= 0 and g is None
        ]
        if missing and self.ungated == "refuse":
            raise RoutingError(
                f"expert {missing[0]!r} has no gates, which PHATGOOSE needs: train them with `phatgoose gate` (or train_gate); "
                "`phatgoose gate --generated` needs no data. Or score it by its weights with ungated=weights, or choose a router "
                "that needs no gates."
            )
        # In float64 until the very end: the mean of v̄ must be zero to the last bit that float32 has.
        bars = [None if g is None else standardise(g.double()).float() for g in candidates.gates]
        if missing:
            return Comparable(candidates, bars, self.top_k, 'PHATGOOSE(ungated="weights")')
        nothing = torch.zeros(candidates.d_in, dtype=torch.float32)
        return _ByVectors(torch.stack([nothing if g is None else g for g in bars]), self.top_k)

    def describe(self) -> dict[str, Any]:
        """Name and settings; `ungated` only where it may matter, so that results of pools with gates keep their description."""
        whole = super().describe()
        return whole if self.ungated != "refuse" else {k: v for k, v in whole.items() if k != "ungated"}


@dataclass(frozen=True)
class AverageActivation(Router):
    """PHATGOOSE with the mean input of an expert's own data at each module in its gate's place: the paper's baseline of that name.

    v is the raw mean over tokens, standardised once; score_e = v̄_eᵀū/√d, softmax over the top k. Needs each expert's data signature
    (`phatgoose signature`), no gates. Every token at every module chooses for itself.
    """

    top_k: int = 2
    """How many experts act on each token."""

    offers_null = True
    reads = "activations"

    def __post_init__(self) -> None:
        at_least_one(self, "top_k")

    def prepared(self, setup: Setup) -> Router:
        vectors = []
        for expert in setup.experts:
            found = expert.signature.activations if expert.signature is not None else None
            if found is None:
                raise RoutingError(
                    f"expert {expert.name!r} has no mean activations of its data, which {type(self).__name__} needs: its "
                    "contributor makes them with `phatgoose signature`. Or choose another router."
                )
            vectors.append(found)
        return _Averaged(self, vectors)

    def bind(self, candidates: Candidates) -> BoundRouter:
        raise RoutingError(f"{type(self).__name__} reads data signatures: attach it with route().")


class _Averaged(Prepared):
    def __init__(self, settings: AverageActivation, vectors: list[Mapping[str, Tensor]]):
        super().__init__(settings)
        self.vectors, self.top_k = vectors, settings.top_k

    def bind(self, candidates: Candidates) -> BoundRouter:
        nothing = torch.zeros(candidates.d_in, dtype=torch.float32)
        bars = [
            nothing if m < 0 else standardise(self.vectors[m][candidates.path].double()).float()
            for m in candidates.members
        ]
        return _ByVectors(torch.stack(bars), self.top_k)


class _ByVectors(BoundRouter):
    def __init__(self, gates: Tensor, top_k: int):
        # More than there are means all of them; kernels hold the number in 64 bits.
        self.gates, self.top_k = gates, min(top_k, len(gates))
        self.by_gates = (gates, self.top_k)

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        return ops.choose(self.scores(u, context, ops), self.top_k)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        if self.gates.device != u.device:
            self.gates = self.gates.to(u.device)
        return ops.gate_scores(u, self.gates)
