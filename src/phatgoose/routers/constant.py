"""Routers that don't look at the activation: one expert, all experts alike, random ones."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.registry import unknown
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates, Drawn, Router


class TypedIndex(int):
    """A number that somebody typed ("single:7"): the expert of this name or, if there is none, at this index."""


@dataclass(frozen=True)
class Single(Router):
    """One expert on every token with weight 1: the same function as plain PEFT with that adapter."""

    expert: str | int
    """Its name, or its index in the pool."""

    chooses = "1 expert, always"

    @classmethod
    def from_text(cls, text: str) -> Single:
        """From the command line: a name, or an index if no expert has that name."""
        # "007" can only be a name. As an index it would be recorded like "single:7".
        is_index = text.isascii() and text.isdigit() and len(text) < 10 and str(int(text)) == text
        return Single(TypedIndex(text) if is_index else text)

    def place(self, names: Sequence[str]) -> int:
        """The expert's index among a pool's names. Raises UnknownName or RoutingError if there is no such expert."""
        name = str(int(self.expert)) if isinstance(self.expert, TypedIndex) else self.expert
        if name in names:
            return names.index(str(name))
        if not isinstance(self.expert, int):
            raise unknown("expert", self.expert, names)
        if not 0 <= self.expert < len(names):
            raise RoutingError(
                f"there is no expert {self.expert}: the pool has {len(names)}, counted from 0."
            )
        return int(self.expert)

    def check(self, names: Sequence[str]) -> None:
        self.place(names)

    def bind(self, candidates: Candidates) -> BoundRouter:
        wanted = self.place(candidates.names)
        return Fixed((candidates.members.index(wanted),) if wanted in candidates.members else (), 1.0)


@dataclass(frozen=True)
class Uniform(Router):
    """Every expert of the pool on every token, each with weight 1/E.

    For low-rank updates this is the same function as the merged expert (the average of the ΔW), computed another way.
    """

    chooses = "all experts, always"
    control = True

    def bind(self, candidates: Candidates) -> BoundRouter:
        return Fixed(tuple(range(len(candidates.members))), 1.0 / len(candidates.names))


@dataclass(frozen=True)
class Random(Drawn):
    """`top_k` experts drawn at random for every token and module, each with weight 1/top_k: a control.

    The draw depends only on the seed, the module, the token's position and its id, so a cache, beams or
    padding don't change it.
    """

    chooses = "top_k random experts per token and module"

    def bind(self, candidates: Candidates) -> BoundRouter:
        return _Random(self.seed, min(self.top_k, len(candidates.names)), candidates)


@dataclass(frozen=True)
class FixedRandom(Drawn):
    """`top_k` experts drawn once for the whole pool, on every token at every module, each with weight 1/top_k:
    a control.

    Against `Random` it says what is lost by mixing ever new experts.
    """

    chooses = "top_k random experts, always"

    def bind(self, candidates: Candidates) -> BoundRouter:
        experts = range(len(candidates.names))
        drawn = random.Random(self.seed).sample(experts, min(self.top_k, len(experts)))
        places = tuple(candidates.members.index(e) for e in drawn if e in candidates.members)
        return Fixed(places, 1.0 / len(drawn))


class Fixed(BoundRouter):
    """The same candidates on every token, each with the same weight."""

    def __init__(self, chosen: tuple[int, ...], weight: float):
        self.chosen, self.weight = chosen, weight

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(self.chosen, dtype=torch.long, device=u.device)
        chosen = chosen.expand(u.shape[0], len(self.chosen))
        return chosen, torch.full(chosen.shape, self.weight, dtype=torch.float32, device=u.device)


class _Random(BoundRouter):
    """Draws among all experts of the pool, also those that have nothing at this module. They do nothing then."""

    def __init__(self, seed: int, top_k: int, candidates: Candidates):
        self.key = zlib.crc32(f"{seed}\0{candidates.path}".encode())
        self.top_k = top_k
        self.by_expert = candidates.by_expert()

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        tokens = context.tokens()
        state = _scramble(tokens.positions.reshape(-1, 1) + self.key)
        if tokens.ids is not None:
            state = _scramble(state ^ tokens.ids.reshape(-1, 1))
        if self.by_expert.device != u.device:
            self.by_expert = self.by_expert.to(u.device)
        # Pseudo-random int64 [N, E]: each token takes the experts that drew the largest numbers.
        draws = _scramble(state + torch.arange(len(self.by_expert), device=u.device))
        chosen = self.by_expert[draws.topk(self.top_k, dim=-1).indices]
        return chosen, torch.full(chosen.shape, 1.0 / self.top_k, dtype=torch.float32, device=u.device)


def _scramble(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors: multiplication wraps around, and masks make the shifts logical."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
