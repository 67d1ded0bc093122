"""Controls: routers that lack just one thing a good router has, to see what that thing is worth."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace

from phatgoose.routers.constant import Fixed
from phatgoose.routers.router import BoundRouter, Candidates, Router
from phatgoose.routers.token import PHATGOOSE
from phatgoose.routers.weights import at_least_one


@dataclass(frozen=True)
class FixedRandom(Router):
    """`top_k` experts drawn once for the whole pool, on every token at every module, each with weight 1/top_k.

    Against `Random`: what is lost by mixing ever new experts.
    """

    seed: int = 0
    """Of the draw."""
    top_k: int = 2
    """How many experts act."""

    def __post_init__(self) -> None:
        at_least_one(self, "top_k")

    def bind(self, candidates: Candidates) -> BoundRouter:
        experts = range(len(candidates.names))
        drawn = random.Random(self.seed).sample(experts, min(self.top_k, len(experts)))
        places = tuple(candidates.members.index(e) for e in drawn if e in candidates.members)
        return Fixed(places, 1.0 / len(drawn))


@dataclass(frozen=True)
class ShuffledGates(Router):
    """PHATGOOSE with the gates of each module dealt anew to its experts.

    Against `PHATGOOSE`: the gates' norms, directions and choices are as concentrated, but say nothing about the experts.
    """

    seed: int = 0
    """Of the shuffling; each module has one of its own."""
    top_k: int = 2
    """How many experts act on each token."""

    offers_null = True

    def __post_init__(self) -> None:
        at_least_one(self, "top_k")

    def bind(self, candidates: Candidates) -> BoundRouter:
        real = [i for i, member in enumerate(candidates.members) if member >= 0]
        dealt = real.copy()
        random.Random(zlib.crc32(f"{self.seed}\0{candidates.path}".encode())).shuffle(dealt)
        gates = list(candidates.gates)
        for place, source in zip(real, dealt, strict=True):
            gates[place] = candidates.gates[source]
        return PHATGOOSE(self.top_k).bind(replace(candidates, gates=tuple(gates)))
