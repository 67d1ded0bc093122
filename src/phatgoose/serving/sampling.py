"""The next token of each sequence, by its own request's settings; engines only hand over logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HEAD = 1024
"""Likeliest tokens among which the top_p share is looked for before all are sorted."""


@dataclass(frozen=True)
class Sampling:
    """What a request says about drawing tokens; names and ranges are OpenAI's."""

    temperature: float = 1.0
    """0: the likeliest token, the first of equal ones."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probabilities add up to this."""
    seed: int | None = None
    """The same seed draws the same tokens, up to the rounding of logits in another batch."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was written already."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for every time that it was written."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    logprobs: int | None = None
    """How many likeliest tokens to report beside the one that was taken; None: no log-probabilities at all."""

    @property
    def plain(self) -> bool:
        """Whether it is the highest of the model's own logits and nothing else."""
        changed = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature == 0 and not changed and self.logprobs is None


@dataclass(frozen=True)
class Likelihood:
    """A token's log-probability (natural logarithm) by the model's own logits, and the likeliest tokens in its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Draw:
    """One sequence's sampling: settings and what they depend on of what was written so far.

    Args:
        branch: which of several answers to one request it is: each has draws of its own.
    """

    def __init__(self, settings: Sampling, branch: int = 0):
        self.settings = settings
        self.likelihoods: list[Likelihood] = []
        """One for each token written, if log-probabilities are asked for."""
        self._written: dict[int, int] = {}
        self._random = torch.Generator()
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((settings.seed * 1_000_003 + branch) % 2**63)

    def next(self, logits: Tensor) -> int:
        """The next token, from logits float32 [V], which stay as they are.

        Raises:
            ArithmeticError: the logits aren't finite.
        """
        s = self.settings
        changed = self._changed(logits)
        best = int(changed.argmax())
        # argmax takes a NaN for the highest.
        if not math.isfinite(float(changed[best])):
            raise ArithmeticError("the model's logits are not finite")
        token = best if s.temperature == 0 else self._drawn(changed.double() - changed[best])
        if s.logprobs is not None:
            self.likelihoods.append(likelihoods(logits[None], [token], s.logprobs)[0])
        self._written[token] = self._written.get(token, 0) + 1
        return token

    def _changed(self, logits: Tensor) -> Tensor:
        s = self.settings
        penalised = s.presence_penalty or s.frequency_penalty
        if not s.logit_bias and not (penalised and self._written):
            return logits
        logits = logits.clone()
        if s.logit_bias:
            logits[torch.tensor(list(s.logit_bias))] += torch.tensor(list(s.logit_bias.values()))
        if penalised and self._written:
            times = torch.tensor(list(self._written.values()), dtype=logits.dtype)
            logits[torch.tensor(list(self._written))] -= s.presence_penalty + s.frequency_penalty * times
        return logits

    def _drawn(self, logits: Tensor) -> int:
        """One uniform number a token, so that a seed's draws don't depend on how many tokens could be drawn.

        logits: float64 [V], the highest 0, which stays 0 over any temperature; the others may become minus infinity.
        """
        probabilities = torch.softmax(logits / self.settings.temperature, dim=-1)
        place = torch.rand(1, generator=self._random, dtype=torch.float64)
        order = None
        if self.settings.top_p < 1:
            probabilities, order = _head(probabilities, self.settings.top_p)
        sums = probabilities.cumsum(0)
        index = int(torch.searchsorted(sums, place * sums[-1], right=True).clamp(max=len(sums) - 1))
        return index if order is None else int(order[index])


def _head(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The fewest highest of them that add up to `share`, and which those are."""
    size = min(HEAD, len(probabilities))
    top, order = probabilities.topk(size)
    if float(top.sum()) < share and size < len(probabilities):
        top, order = probabilities.sort(descending=True)
    before = top.cumsum(0) - top
    count = max(int((before < share).sum()), 1)
    return top[:count], order[:count]


def choose(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], dict[int, Exception]]:
    """The next token of each of R sequences from logits float32 [R, V], and what went wrong with which of them.

    One that failed has token 0, and the others are not disturbed.
    """
    logits = logits.cpu()
    best = logits.argmax(-1)
    finite = logits.gather(1, best[:, None]).squeeze(1).isfinite().tolist()
    tokens, failed = best.tolist(), {}
    for i, draw in enumerate(draws):
        if draw.settings.plain and finite[i]:
            continue
        try:
            tokens[i] = draw.next(logits[i])
        except Exception as error:
            tokens[i], failed[i] = 0, error
    return tokens, failed


def likelihoods(logits: Tensor, tokens: Sequence[int], top: int) -> list[Likelihood]:
    """Of each of these tokens by logits [N, V] that predict them, with the `top` likeliest ones in its place."""
    logits = logits.float()
    found = torch.log_softmax(logits, dim=-1)
    own = found.gather(1, torch.tensor(tokens)[:, None]).squeeze(1).tolist()
    if not top:
        return [Likelihood(t, lp) for t, lp in zip(tokens, own, strict=True)]
    values, ids = found.topk(min(top, found.shape[-1]), dim=-1)
    return [
        Likelihood(t, lp, tuple(zip(i, v, strict=True)))
        for t, lp, i, v in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]
