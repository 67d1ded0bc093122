"""Routers that score every token by one stored vector per expert and module."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import (
    BoundRouter,
    ByScores,
    Candidates,
    Drawn,
    PreparedRouter,
    Router,
    Setup,
    SignatureRouter,
    TopK,
    signed,
)
from phatgoose.routers.weights import Calibrated, standardised_gate

UNGATED = ("refuse", "weights")


@dataclass(frozen=True)
class PHATGOOSE(TopK):
    """Top-k by standardised gates (Muqeeth et al. 2024, arXiv 2402.05859): score_e = v̄_eᵀū/√d, softmax over the top k.

    Needs a trained gate per expert and module. At a module that only some of the pool's experts adapt, a null candidate
    (score 0, no update) stands for the others. Without it the few that adapt the module would act on every token.
    """

    top_k: int = 2
    """How many experts act on each token. The paper's value is 2; a value above the pool's size means all experts."""
    ungated: Literal["refuse", "weights"] = "refuse"
    """What to do about experts without gates: "refuse" them by name, or let their "weights" score them. Then
    all scores at a module with such an expert are standardised on reference text (docs/method.md, "Experts
    without gates")."""

    paper = "Muqeeth et al. 2024, arXiv 2402.05859"
    needs = "gates, trained on the expert's data (none with ungated=weights)"
    offers_null = True

    def __post_init__(self) -> None:
        super().__post_init__()
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
                f"expert {missing[0]!r} has no gates, which PHATGOOSE needs: train them with `phatgoose "
                "gate` (or train_gate); `phatgoose gate --generated` needs no data. Or score it by its "
                "weights with ungated=weights, or choose a router that needs no gates."
            )
        gates = [None if g is None else standardised_gate(g) for g in candidates.gates]
        if missing:
            return Calibrated(candidates, gates, self.top_k, 'PHATGOOSE(ungated="weights")')
        return _ByGates(candidates, gates, self.top_k)

    def describe(self) -> dict[str, Any]:
        """Name and settings; `ungated` only where it is set, so that older results keep their description."""
        return {k: v for k, v in super().describe().items() if (k, v) != ("ungated", "refuse")}


@dataclass(frozen=True)
class ShuffledGates(Drawn):
    """PHATGOOSE with the gates of each module dealt anew to its experts: a control.

    The gates' norms and directions stay, and the choices are as concentrated, but they say nothing about the experts.
    Each module is shuffled differently.
    """

    needs = "gates"
    chooses = "top_k experts per token and module, by another expert's gate"
    offers_null = True

    def bind(self, candidates: Candidates) -> BoundRouter:
        real = [i for i, member in enumerate(candidates.members) if member >= 0]
        dealt = real.copy()
        random.Random(zlib.crc32(f"{self.seed}\0{candidates.path}".encode())).shuffle(dealt)
        gates = list(candidates.gates)
        for place, source in zip(real, dealt, strict=True):
            gates[place] = candidates.gates[source]
        return PHATGOOSE(self.top_k).bind(replace(candidates, gates=tuple(gates)))


@dataclass(frozen=True)
class AverageActivation(TopK, SignatureRouter):
    """PHATGOOSE with the mean input of an expert's own data at each module as its gate: the paper's baseline
    of that name.

    v is the raw mean over tokens, standardised once; score_e = v̄_eᵀū/√d, softmax over the top k. Needs each
    expert's data signature (`phatgoose signature`), no gates. Every token at every module chooses for itself.
    """

    paper = "the same, a baseline"
    needs = "data signatures: activations; nothing trained"
    offers_null = True
    reads = "activations"

    def prepared(self, setup: Setup) -> Router:
        return PreparedRouter(self, partial(self._bind, signed(self, setup)))

    def _bind(self, means: Sequence[Mapping[str, Tensor]], candidates: Candidates) -> BoundRouter:
        gates = [None if m < 0 else standardised_gate(means[m][candidates.path]) for m in candidates.members]
        return _ByGates(candidates, gates, self.top_k)


class _ByGates(ByScores):
    """The score of the candidate without a gate, which is the null candidate, is 0."""

    def __init__(self, candidates: Candidates, gates: Sequence[Tensor | None], top_k: int):
        # A larger top_k means all of them; kernels hold the number in 64 bits.
        super().__init__(min(top_k, len(gates)))
        null = torch.zeros(candidates.d_in, dtype=torch.float32)
        self.gates = torch.stack([null if gate is None else gate for gate in gates])
        self.by_gates = (self.gates, self.top_k)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        if self.gates.device != u.device:
            self.gates = self.gates.to(u.device)
        return ops.gate_scores(u, self.gates)
