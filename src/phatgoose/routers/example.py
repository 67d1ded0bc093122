"""Routers that read the text: experts whose own texts, embedded, are near to the prompt.

Embeddings have length 1, so similarity is q·x. These routers need each expert's data signature (`phatgoose
signature`); nothing is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Backend
from phatgoose.routers.context import RoutingContext, Texts
from phatgoose.routers.embeddings import PoolEmbeddings
from phatgoose.routers.router import (
    ByScores,
    Candidates,
    PreparedRouter,
    Router,
    Setup,
    SignatureRouter,
    check_at_least,
    signed,
)

AUTO = "auto"


@dataclass(frozen=True)
class ByText(SignatureRouter):
    """What the routers of this file have in common."""

    encoder: str = AUTO
    """The sentence encoder that the experts' signatures were made with: a name or folder; "auto": the one they name."""

    needs = "data signatures: texts; a sentence encoder"
    chooses = "1 expert per sequence"
    reads = "texts"
    by_token = False

    def describe(self) -> dict[str, Any]:
        """Without the encoder: the signatures say which one it is, wherever it is read from."""
        return {k: v for k, v in super().describe().items() if k != "encoder"}

    def embeddings(self, setup: Setup) -> PoolEmbeddings:
        if setup.decode is None:
            raise RoutingError(
                f"{type(self).__name__} reads text, for which it needs the tokenizer: pass the Base instead of the "
                "bare model."
            )
        return PoolEmbeddings(setup, signed(self, setup), None if self.encoder == AUTO else self.encoder)

    def library(self, setup: Setup) -> PoolEmbeddings:
        """Deprecated: use `embeddings`."""
        warnings.warn(f"{type(self).__name__}.library is now embeddings.", DeprecationWarning, stacklevel=2)
        return self.embeddings(setup)


@dataclass(frozen=True)
class Retrieval(ByText):
    """The expert of the one training text nearest to the prompt, on the whole sequence (Jang et al. 2023,
    arXiv 2302.03202).

    e* = argmax_e max_i q·x_{e,i} over up to 1000 texts of each expert; weight 1. An expert that has nothing at
    a module does nothing there.
    """

    paper = "Jang et al. 2023, arXiv 2302.03202"

    def prepared(self, setup: Setup) -> Router:
        found = self.embeddings(setup)
        return _prepared_best(self, lambda texts: found.nearest(found.prompts(texts)))


@dataclass(frozen=True)
class Centroid(ByText):
    """The expert whose mean embedding is nearest to the prompt, on the whole sequence (the routing of Durbin's
    and Maxine's, 2023).

    e* = argmax_e cos(q, mean_i x_{e,i}); weight 1. An expert that has nothing at a module does nothing there.
    """

    paper = "Durbin (airoboros) and Maxine (Mo'LoRA) 2023, as the PHATGOOSE paper names them"

    def prepared(self, setup: Setup) -> Router:
        found = self.embeddings(setup)
        return _prepared_best(self, lambda texts: found.central(found.prompts(texts)))


@dataclass(frozen=True)
class SoftCentroid(ByText):
    """All experts, weighted by how near the text so far is to their mean embeddings, anew for every token
    (Belofsky 2023, arXiv 2311.10847).

    s_e = cos(q_t, mean_i x_{e,i}), the largest times `temperature`, w = softmax(s). q_t embeds the prompt and
    what was written up to token t; the prompt's own tokens share its embedding. The same as in the paper, but
    with a key-value cache: earlier tokens keep the mixture that they were read with. (The author merges A and
    B apart; here the mixture is exact.)
    """

    temperature: int = 4
    """The factor of the largest similarity; 4 in the author's code."""
    every: int = 1
    """The text is embedded anew after this many tokens. 0: never, the prompt's embedding serves the whole sequence."""

    paper = "Belofsky 2023, arXiv 2311.10847"
    chooses = "all experts, weighted per token"

    def __post_init__(self) -> None:
        check_at_least(self, temperature=1, every=0)

    def prepared(self, setup: Setup) -> Router:
        embeddings = self.embeddings(setup)

        def compute(texts: Texts) -> tuple[Tensor, Tensor]:
            """Similarities and weights, both [B, T, E]."""
            found = embeddings.central(embeddings.so_far(texts, self.every))
            return found, self.boosted(found).softmax(-1)

        of_pass = _once_per_pass(compute)
        return PreparedRouter(self, lambda candidates: _Mixture(self, of_pass, candidates))

    def boosted(self, similarities: Tensor) -> Tensor:
        """The similarities with the largest of each token multiplied by the temperature."""
        best = similarities.argmax(-1, keepdim=True)
        return similarities.scatter(-1, best, self.temperature * similarities.gather(-1, best))


_OfTexts = Callable[[Texts], tuple[Tensor, Tensor]]


def _once_per_pass(compute: _OfTexts) -> _OfTexts:
    """`compute`, called once for the texts of a pass, whichever of its modules asks first."""
    known: WeakKeyDictionary[Texts, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def of_pass(texts: Texts) -> tuple[Tensor, Tensor]:
        if texts not in known:
            known[texts] = compute(texts)
        return known[texts]

    return of_pass


def _prepared_best(settings: Router, scores: Callable[[Texts], Tensor]) -> Router:
    """One expert per sequence: the first of those in the pool with the highest score. `scores` gives [B, E]."""
    of_pass = _once_per_pass(lambda texts: (found := scores(texts)[:, None], found.argmax(-1)))
    return PreparedRouter(settings, lambda candidates: _Best(settings, of_pass, candidates, 1))


class _Best(ByScores):
    """`of_pass` gives the scores, [B, 1, E], and the best expert, [B, 1]."""

    def __init__(self, settings: Router, of_pass: _OfTexts, candidates: Candidates, top_k: int):
        super().__init__(top_k)
        self.name, self.of_pass = type(settings).__name__, of_pass
        self.path, self.members = candidates.path, list(candidates.members)
        self.by_expert = candidates.by_expert()

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        best = context.spread(self.by_expert[self.of_pass(context.texts())[1]][..., None])
        return best.to(u.device), torch.ones(best.shape, dtype=torch.float32, device=u.device)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        # The best of the whole pool may be an expert that has nothing here. Scores of the others don't say so.
        if context.allowed is not None and len(self.members) < len(self.by_expert):
            raise RoutingError(
                f"{self.name} chooses among the whole pool, and not all of it adapts {self.path}: experts can't be "
                "switched off one by one. Make a pool without them instead."
            )
        return context.spread(self.of_pass(context.texts())[0])[:, self.members].to(u.device)


class _Mixture(_Best):
    """`of_pass` gives the similarities and the weights, both [B, T, E]."""

    def __init__(self, settings: SoftCentroid, of_pass: _OfTexts, candidates: Candidates):
        super().__init__(settings, of_pass, candidates, len(candidates.members))
        self.boosted = settings.boosted

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        weights = context.spread(self.of_pass(context.texts())[1][..., self.members]).to(u.device)
        return torch.arange(self.top_k, device=u.device).expand(weights.shape), weights

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        found = super().scores(u, context, ops)
        # The largest similarity is that of the experts that are switched on.
        if context.allowed is not None:
            found = found.masked_fill(~context.allowed, -torch.inf)
        return self.boosted(found)
