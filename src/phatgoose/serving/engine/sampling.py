"""Choose the next token of each sequence from its logits, by its own request's parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HEAD = 1024
"""top_p is first tried on this many likeliest tokens, before all are sorted."""
RULED_OUT = "min_tokens, bad_words and allowed_token_ids together rule out every token"


@dataclass(frozen=True)
class SamplingParams:
    """What a request says about sampling, as the fields of the same names in `api/schema.py` describe it.

    The order: forbidden tokens are ruled out; `logit_bias`, `repetition_penalty` and the other penalties change the
    logits; unless the temperature is 0, `temperature`, `top_k`, `top_p` and `min_p` apply as in transformers.
    """

    temperature: float = 1.0
    """0: the likeliest token, the first of equal ones."""
    top_p: float = 1.0
    top_k: int = 0
    """Tokens as likely as the last of the top k are kept, too. 0: all."""
    min_p: float = 0.0
    seed: int | None = None
    """The same seed samples the same tokens, up to rounding: another batch may round logits differently."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end an answer, which `min_tokens` holds back."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never written: the last token is ruled out where the others come before it."""
    allowed: tuple[int, ...] | None = None
    """Only these tokens are written; None: all."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one; None: no log-probabilities at all."""

    @property
    def greedy(self) -> bool:
        """Whether the next token is simply the argmax of the model's own logits, and nothing is reported."""
        changed = (
            self.presence_penalty or self.frequency_penalty or self.logit_bias or self.repetition_penalty != 1
        )
        ruled_out = self.min_tokens or self.bad_words or self.allowed is not None
        return self.temperature == 0 and not changed and not ruled_out and self.logprobs is None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (natural logarithm) by the model's own logits."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place and their log-probabilities, best first."""
    rank: int = 1
    """1 for the likeliest token."""


class SequenceSampler:
    """Samples one sequence: its parameters, its random generator, and what depends on the tokens written so far.

    Args:
        branch: which of several answers to one request this is. Each answer has random numbers of its own.
        prompt: the tokens before the answer, for the repetition penalty.
    """

    def __init__(self, params: SamplingParams, branch: int = 0, prompt: Sequence[int] = ()):
        self.params = params
        self.logprobs: list[TokenLogprob] = []
        """One for each written token, if log-probabilities were asked for."""
        self._written: list[int] = []
        self._counts: Counter[int] = Counter()
        self._prompt = (
            torch.tensor(sorted(set(prompt)), dtype=torch.long) if params.repetition_penalty != 1 else None
        )
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((params.seed * 1_000_003 + branch) % 2**63)

    def next_token(self, logits: Tensor) -> int:
        """The next token by logits float32 [V], which aren't modified.

        Raises:
            ArithmeticError: the logits aren't finite, or every token is ruled out.
        """
        params = self.params
        changed = self._change_logits(logits)
        best = int(changed.argmax())
        # argmax takes NaN for the maximum.
        if not math.isfinite(float(changed[best])):
            if changed is not logits and math.isfinite(float(logits.max())):
                raise ArithmeticError(RULED_OUT)
            raise ArithmeticError("the model's logits are not finite")
        token = best if params.temperature == 0 else self._sample(changed.double() - changed[best])
        if params.logprobs is not None:
            self.logprobs += token_logprobs(logits[None], [token], params.logprobs)
        self._written.append(token)
        self._counts[token] += 1
        return token

    def _change_logits(self, logits: Tensor) -> Tensor:
        """The logits after forbidden tokens, bias and penalties; the same tensor if none of them applies."""
        params = self.params
        penalised = (params.presence_penalty or params.frequency_penalty) and self._counts
        forbidden = self._forbidden_tokens()
        neutral = not params.logit_bias and not penalised and self._prompt is None
        if neutral and not forbidden and params.allowed is None:
            return logits
        logits = logits.clone()
        if params.allowed is not None:
            allowed = torch.tensor(params.allowed)
            logits = torch.full_like(logits, -torch.inf).scatter_(0, allowed, logits[allowed])
        if forbidden:
            logits[torch.tensor(forbidden)] = -torch.inf
        if params.logit_bias:
            logits[torch.tensor(list(params.logit_bias))] += torch.tensor(list(params.logit_bias.values()))
        if self._prompt is not None:
            written = torch.tensor(list(self._counts), dtype=torch.long)
            seen = torch.cat([self._prompt, written]).unique()
            own, penalty = logits[seen], params.repetition_penalty
            logits[seen] = torch.where(own < 0, own * penalty, own / penalty)
        if penalised:
            times = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits[torch.tensor(list(self._counts))] -= (
                params.presence_penalty + params.frequency_penalty * times
            )
        return logits

    def _forbidden_tokens(self) -> list[int]:
        """Tokens that may not come next."""
        tokens: list[int] = []
        if len(self._written) < self.params.min_tokens:
            tokens += self.params.end_tokens
        for word in self.params.bad_words:
            before = list(word[:-1])
            if not before or self._written[-len(before) :] == before:
                tokens.append(word[-1])
        return tokens

    def _sample(self, logits: Tensor) -> int:
        """Samples by logits float64 [V], shifted so that the highest is 0.

        A tiny temperature keeps 0 at 0 and only sends the others to minus infinity. Each token takes one uniform
        random number, so a seed's numbers don't depend on how many tokens there are to choose from.
        """
        params = self.params
        logits = logits / params.temperature
        if 0 < params.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
        probabilities = torch.softmax(logits, dim=-1)
        uniform = torch.rand(1, generator=self._random, dtype=torch.float64)
        order = None
        if params.top_p < 1:
            probabilities, order = _top_p(probabilities, params.top_p)
        if params.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
        sums = probabilities.cumsum(0)
        # Rounding may put the number behind the last sum.
        index = int(torch.searchsorted(sums, uniform * sums[-1], right=True).clamp(max=len(sums) - 1))
        return index if order is None else int(order[index])


def _top_p(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest highest probabilities that add up to `top_p`, and their indices."""
    size = min(HEAD, len(probabilities))
    top, order = probabilities.topk(size)
    if float(top.sum()) < top_p and size < len(probabilities):
        top, order = probabilities.sort(descending=True)
    before = top.cumsum(0) - top
    count = max(int((before < top_p).sum()), 1)
    return top[:count], order[:count]


def sample_batch(
    logits: Tensor, samplers: Sequence[SequenceSampler]
) -> tuple[list[int], dict[int, Exception]]:
    """The next tokens of R sequences by logits float32 [R, V], and the errors of those that failed.

    A sequence that fails gets token 0 and doesn't disturb the others.
    """
    logits = logits.cpu()
    best = logits.argmax(-1)
    finite = logits.gather(1, best[:, None]).squeeze(1).isfinite().tolist()
    tokens, failed = best.tolist(), {}
    for i, sampler in enumerate(samplers):
        if sampler.params.greedy and finite[i]:
            continue
        try:
            tokens[i] = sampler.next_token(logits[i])
        except Exception as error:
            tokens[i], failed[i] = 0, error
    return tokens, failed


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probabilities of N tokens by the logits [N, V] that predict them, with the `top` likeliest rivals."""
    all_logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = all_logprobs.gather(1, torch.tensor(tokens)[:, None])
    ranks = (1 + (all_logprobs > own).sum(1)).tolist()
    # top=0 gives empty rows.
    values, ids = all_logprobs.topk(min(top, all_logprobs.shape[-1]), dim=-1)
    rows = zip(tokens, own.squeeze(1).tolist(), ids.tolist(), values.tolist(), ranks, strict=True)
    return [TokenLogprob(t, lp, tuple(zip(i, v, strict=True)), rank) for t, lp, i, v, rank in rows]
