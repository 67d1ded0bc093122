"""The next token of each sequence, by its own request's settings; engines only hand over logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HEAD = 1024
"""Likeliest tokens among which the top_p share is looked for before all are sorted."""
RULED_OUT = "min_tokens, bad_words and allowed_token_ids together rule out every token"


@dataclass(frozen=True)
class Sampling:
    """What a request says about drawing tokens; names and ranges are OpenAI's, or vLLM's where OpenAI has none.

    In this order: tokens are ruled out, `logit_bias`, `repetition_penalty`, the other penalties; where tokens are drawn, then
    `temperature`, `top_k`, `top_p`, `min_p`, the last four as transformers' generate() does.
    """

    temperature: float = 1.0
    """0: the likeliest token, the first of equal ones."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Draw among this many likeliest tokens, and those as likely as the last of them; 0: all."""
    min_p: float = 0.0
    """Draw among tokens that are at least this part as likely as the likeliest."""
    seed: int | None = None
    """The same seed draws the same tokens, up to the rounding of logits in another batch."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was written already."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for every time that it was written."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    repetition_penalty: float = 1.0
    """The logit of every token that the prompt or the answer has already is divided by this, or multiplied where it is negative."""
    min_tokens: int = 0
    """So many tokens are written before one of `ends` may be."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer, for `min_tokens`."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that aren't written: their last token isn't behind the others."""
    allowed: tuple[int, ...] | None = None
    """Only these tokens are written; None: all."""
    logprobs: int | None = None
    """How many likeliest tokens to report beside the one that was taken; None: no log-probabilities at all."""

    @property
    def plain(self) -> bool:
        """Whether it is the highest of the model's own logits and nothing else."""
        changed = (
            self.presence_penalty or self.frequency_penalty or self.logit_bias or self.repetition_penalty != 1
        )
        ruled_out = self.min_tokens or self.bad_words or self.allowed is not None
        return self.temperature == 0 and not changed and not ruled_out and self.logprobs is None


@dataclass(frozen=True)
class Likelihood:
    """A token's log-probability (natural logarithm) by the model's own logits, and the likeliest tokens in its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1
    """How many tokens are likelier, and one."""


class Draw:
    """One sequence's sampling: settings and what they depend on of what was written so far.

    Args:
        branch: which of several answers to one request it is: each has draws of its own.
        seen: tokens before the answer, for the repetition penalty.
    """

    def __init__(self, settings: Sampling, branch: int = 0, seen: Sequence[int] = ()):
        self.settings = settings
        self.likelihoods: list[Likelihood] = []
        """One for each token written, if log-probabilities are asked for."""
        self._written: dict[int, int] = {}
        self._order: list[int] = []
        self._seen = (
            torch.tensor(sorted(set(seen)), dtype=torch.long) if settings.repetition_penalty != 1 else None
        )
        self._random = torch.Generator()
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((settings.seed * 1_000_003 + branch) % 2**63)

    def next(self, logits: Tensor) -> int:
        """The next token, from logits float32 [V], which stay as they are.

        Raises:
            ArithmeticError: the logits aren't finite, or every token is ruled out.
        """
        s = self.settings
        changed = self._changed(logits)
        best = int(changed.argmax())
        # argmax takes a NaN for the highest.
        if not math.isfinite(float(changed[best])):
            if changed is not logits and math.isfinite(float(logits.max())):
                raise ArithmeticError(RULED_OUT)
            raise ArithmeticError("the model's logits are not finite")
        token = best if s.temperature == 0 else self._drawn(changed.double() - changed[best])
        if s.logprobs is not None:
            self.likelihoods.append(likelihoods(logits[None], [token], s.logprobs)[0])
        self._written[token] = self._written.get(token, 0) + 1
        self._order.append(token)
        return token

    def _changed(self, logits: Tensor) -> Tensor:
        s = self.settings
        penalised = s.presence_penalty or s.frequency_penalty
        repeated = self._repeated()
        out = self._ruled_out()
        nothing = not s.logit_bias and not (penalised and self._written) and repeated is None
        if nothing and not out and s.allowed is None:
            return logits
        logits = logits.clone()
        if s.allowed is not None:
            allowed = torch.tensor(s.allowed)
            logits = torch.full_like(logits, -torch.inf).scatter_(0, allowed, logits[allowed])
        if out:
            logits[torch.tensor(out)] = -torch.inf
        if s.logit_bias:
            logits[torch.tensor(list(s.logit_bias))] += torch.tensor(list(s.logit_bias.values()))
        if repeated is not None:
            own = logits[repeated]
            logits[repeated] = torch.where(own < 0, own * s.repetition_penalty, own / s.repetition_penalty)
        if penalised and self._written:
            times = torch.tensor(list(self._written.values()), dtype=logits.dtype)
            logits[torch.tensor(list(self._written))] -= s.presence_penalty + s.frequency_penalty * times
        return logits

    def _repeated(self) -> Tensor | None:
        """Tokens that were there already, if that changes anything."""
        if self._seen is None:
            return None
        return torch.cat([self._seen, torch.tensor(list(self._written), dtype=torch.long)]).unique()

    def _ruled_out(self) -> list[int]:
        """Tokens that may not be written now."""
        s = self.settings
        found: list[int] = []
        if len(self._order) < s.min_tokens:
            found += s.ends
        for word in s.bad_words:
            before = list(word[:-1])
            if not before or self._order[-len(before) :] == before:
                found.append(word[-1])
        return found

    def _drawn(self, logits: Tensor) -> int:
        """One uniform number a token, so that a seed's draws don't depend on how many tokens could be drawn.

        logits: float64 [V], the highest 0, which stays 0 over any temperature; the others may become minus infinity.
        """
        s = self.settings
        logits = logits / s.temperature
        if 0 < s.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(s.top_k).values[-1], -torch.inf)
        probabilities = torch.softmax(logits, dim=-1)
        place = torch.rand(1, generator=self._random, dtype=torch.float64)
        order = None
        if s.top_p < 1:
            probabilities, order = _head(probabilities, s.top_p)
        if s.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < s.min_p * probabilities.max(), 0.0)
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
    place = found.gather(1, torch.tensor(tokens)[:, None])
    ranks, own = (1 + (found > place).sum(1)).tolist(), place.squeeze(1).tolist()
    if not top:
        return [Likelihood(t, lp, (), r) for t, lp, r in zip(tokens, own, ranks, strict=True)]
    values, ids = found.topk(min(top, found.shape[-1]), dim=-1)
    return [
        Likelihood(t, lp, tuple(zip(i, v, strict=True)), r)
        for t, lp, i, v, r in zip(tokens, own, ids.tolist(), values.tolist(), ranks, strict=True)
    ]
