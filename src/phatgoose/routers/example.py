"""Routers that read the text: an expert is as fit as its own training texts, embedded, are near to the prompt, embedded.

Embeddings have length 1, so that similarity is q·x. They need each expert's data signature (`phatgoose signature`); nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.routers.context import RoutingContext, Texts
from phatgoose.routers.library import Library
from phatgoose.routers.router import BoundRouter, Candidates, Prepared, Router, Setup
from phatgoose.routers.weights import at_least_one

AUTO = "auto"


@dataclass(frozen=True)
class ByText(Router):
    """What the routers of this file have in common."""

    encoder: str = AUTO
    """The sentence encoder: a name or folder; "auto": the one that the experts' signatures name. It must be the very same."""

    reads = "texts"
    by_token = False

    def bind(self, candidates: Candidates) -> BoundRouter:
        raise RoutingError(f"{type(self).__name__} reads data signatures: attach it with route().")

    def describe(self) -> dict[str, Any]:
        """Without the encoder, which the signatures fix, wherever it is read from."""
        return {k: v for k, v in super().describe().items() if k != "encoder"}

    def library(self, setup: Setup) -> Library:
        return Library(setup, None if self.encoder == AUTO else self.encoder, type(self).__name__)


@dataclass(frozen=True)
class Retrieval(ByText):
    """The expert of the one training text nearest to the prompt, on the whole sequence (Jang et al. 2023, arXiv 2302.03202).

    e* = argmax_e max_i q·x_{e,i} over up to 1000 texts of each expert; weight 1. An expert that has nothing at a module does nothing there.
    """

    def prepared(self, setup: Setup) -> Router:
        library = self.library(setup)
        return _Chosen(self, lambda texts: library.nearest(library.prompts(texts)))


@dataclass(frozen=True)
class Centroid(ByText):
    """The expert whose mean embedding is nearest to the prompt, on the whole sequence (the routing of Durbin's and Maxine's, 2023).

    e* = argmax_e cos(q, mean_i x_{e,i}); weight 1. An expert that has nothing at a module does nothing there.
    """

    def prepared(self, setup: Setup) -> Router:
        library = self.library(setup)
        return _Chosen(self, lambda texts: library.central(library.prompts(texts)))


@dataclass(frozen=True)
class SoftCentroid(ByText):
    """All experts, weighted by how near the text so far is to their mean embeddings, anew for every token (Belofsky 2023, arXiv 2311.10847).

    s_e = cos(q_t, mean_i x_{e,i}), the largest times `temperature`, w = softmax(s). q_t embeds the prompt and what was written up to token
    t; the prompt's own tokens share its embedding. As there, but with a key-value cache: earlier tokens keep the mixture they were read
    with. (The author merges A and B apart; here the mixture is exact.)
    """

    temperature: int = 4
    """What the largest similarity is multiplied with; 4 in the author's code."""
    every: int = 1
    """Tokens after which the text is embedded anew; 0: never, the prompt's embedding serves the whole sequence."""

    def __post_init__(self) -> None:
        at_least_one(self, "temperature")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 0:
            raise RoutingError(f"every is {self.every!r}, expected a whole number of at least 0.")

    def prepared(self, setup: Setup) -> Router:
        return _Mixed(self, self.library(setup))


class _PerPass:
    """Two tensors computed once for the texts of a pass, whichever of its modules asks first."""

    def __init__(self, compute: Callable[[Texts], tuple[Tensor, Tensor]]) -> None:
        self.compute = compute
        self.known: WeakKeyDictionary[Texts, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def __call__(self, texts: Texts) -> tuple[Tensor, Tensor]:
        if texts not in self.known:
            self.known[texts] = self.compute(texts)
        return self.known[texts]


class _Chosen(Prepared):
    """One expert a sequence, the first of those with the highest score [B, E] of all the pool's."""

    def __init__(self, settings: Router, scores: Callable[[Texts], Tensor]):
        super().__init__(settings)
        self.last = _PerPass(lambda texts: (found := scores(texts)[:, None], found.argmax(-1)))

    def bind(self, candidates: Candidates) -> BoundRouter:
        return _One(self, candidates)


class _One(BoundRouter):
    top_k = 1

    def __init__(self, owner: _Chosen, candidates: Candidates):
        self.owner, self.path, self.members = owner, candidates.path, list(candidates.members)
        slots = {member: slot for slot, member in enumerate(candidates.members)}
        self.slots = torch.tensor([slots.get(e, -1) for e in range(len(candidates.names))])

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        best = context.spread(self.slots[self.owner.last(context.texts())[1]][..., None])
        return best.to(u.device), torch.ones(best.shape, dtype=torch.float32, device=u.device)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        _whole_pool(self, context)
        return context.spread(self.owner.last(context.texts())[0])[:, self.members].to(u.device)


class _Mixed(Prepared):
    """All experts, by similarities that change with the tokens."""

    def __init__(self, settings: SoftCentroid, library: Library):
        super().__init__(settings)
        self.temperature = settings.temperature

        def compute(texts: Texts) -> tuple[Tensor, Tensor]:
            """Similarities and weights, both [B, T, E]."""
            found = library.central(library.so_far(texts, settings.every))
            return found, self.boosted(found).softmax(-1)

        self.last = _PerPass(compute)

    def bind(self, candidates: Candidates) -> BoundRouter:
        return _Soft(self, candidates)

    def boosted(self, similarities: Tensor) -> Tensor:
        best = similarities.argmax(-1, keepdim=True)
        return similarities.scatter(-1, best, self.temperature * similarities.gather(-1, best))


class _Soft(BoundRouter):
    def __init__(self, owner: _Mixed, candidates: Candidates):
        self.owner, self.members, self.path = owner, list(candidates.members), candidates.path
        self.top_k = len(self.members)
        self.slots = torch.arange(len(candidates.names))

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        weights = context.spread(self.owner.last(context.texts())[1][..., self.members]).to(u.device)
        return torch.arange(self.top_k, device=u.device).expand(weights.shape), weights

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        _whole_pool(self, context)
        found = context.spread(self.owner.last(context.texts())[0])[:, self.members].to(u.device)
        if context.allowed is not None:
            found = found.masked_fill(~context.allowed, -torch.inf)
        return self.owner.boosted(found)


def _whole_pool(bound: _One | _Soft, context: RoutingContext) -> None:
    """Where experts are switched off and one of the pool is missing at a module, scores of those there don't say who is best."""
    if context.allowed is not None and len(bound.members) < len(bound.slots):
        raise RoutingError(
            f"{type(bound.owner.settings).__name__} chooses among the whole pool, and not all of it adapts {bound.path}: experts can't be "
            "switched off one by one. Make a pool without them instead."
        )
