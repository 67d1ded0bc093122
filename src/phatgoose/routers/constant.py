"""Routers that don't look at the activation: one expert, all experts alike, random ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.registry import unknown
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates, Router


class Written(int):
    """An expert's place as somebody wrote it ("single:7"): an expert of this name goes before it."""


@dataclass(frozen=True)
class Single(Router):
    """One expert on every token with weight 1: the same function as plain PEFT with that adapter."""

    expert: str | int
    """Its name, or its index in the pool."""

    def place(self, names: Sequence[str]) -> int:
        """The expert's index among a pool's names.

        Raises:
            UnknownName, RoutingError: there is no such expert.
        """
        name = str(int(self.expert)) if isinstance(self.expert, Written) else self.expert
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

    For low-rank updates this is the same function as the merged expert (average of the ΔW), computed another way.
    """

    def bind(self, candidates: Candidates) -> BoundRouter:
        return Fixed(tuple(range(len(candidates.members))), 1.0 / len(candidates.names))


@dataclass(frozen=True)
class Random(Router):
    """`top_k` experts drawn at random for every token and module, each with weight 1/top_k: a control.

    The draw depends only on the seed, the module, the token's position and its id, so a cache, beams or padding don't change it.
    """

    seed: int = 0
    top_k: int = 2

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise RoutingError(f"top_k is {self.top_k!r}, expected a whole number of at least 1.")

    def bind(self, candidates: Candidates) -> BoundRouter:
        return _Random(self.seed, min(self.top_k, len(candidates.names)), candidates)


class Fixed(BoundRouter):
    """The same candidates on every token, each with the same weight."""

    def __init__(self, chosen: tuple[int, ...], weight: float):
        self.chosen, self.weight = chosen, weight

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(self.chosen, dtype=torch.long, device=u.device).expand(
            u.shape[0], len(self.chosen)
        )
        return chosen, torch.full(chosen.shape, self.weight, dtype=torch.float32, device=u.device)


class _Random(BoundRouter):
    """Draws among all of the pool's experts; one that has nothing at this module is drawn like the others and does nothing."""

    def __init__(self, seed: int, top_k: int, candidates: Candidates):
        self.key = zlib.crc32(f"{seed}\0{candidates.path}".encode())
        self.top_k = top_k
        slots = {member: slot for slot, member in enumerate(candidates.members)}
        self.slots = torch.tensor([slots.get(e, -1) for e in range(len(candidates.names))])

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        tokens = context.tokens()
        state = _scramble(tokens.positions.reshape(-1, 1) + self.key)
        if tokens.ids is not None:
            state = _scramble(state ^ tokens.ids.reshape(-1, 1))
        if self.slots.device != u.device:
            self.slots = self.slots.to(u.device)
        draws = _scramble(
            state + torch.arange(len(self.slots), device=u.device)
        )  # [N, E] pseudo-random int64
        chosen = self.slots[draws.topk(self.top_k, dim=-1).indices]
        return chosen, torch.full(chosen.shape, 1.0 / self.top_k, dtype=torch.float32, device=u.device)


def _scramble(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors (multiplication wraps around, shifts made logical by masking)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
