"""Rank classification: the answer with the highest log-likelihood per token.

A choice's end token counts as one of its tokens.

    score(choice) = (1 / n) Σ_{j=1..n} log p(t_j | prompt, t_1 … t_{j−1}),   t_n the end token

The highest score wins; of equal ones the first. Scores are computed from the model's logits in float32, but a
bf16 model's own rounding stays in them: compared with one plain forward a choice they differ by up to 0.1 nats
per token there (2e-5 in float32; a model of 135M parameters). So close choices may tie, or swap when the
batches change. Choices of one row that are equal as tokens are scored once, so they always tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import (
    LogitBatch,
    continuations,
    uncached_continuations,
)
from phatgoose.evaluation.prefill import Prefill, prefill_batches
from phatgoose.evaluation.rows import Row

_CHUNK = 2**24  # logits turned to float32 at a time


def score_choices(
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad: int,
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, ...]]:
    """Length-normalised log-likelihoods (nats per token) of each row's answers, in their order.

    Each prompt is run once and its cache shared by its answers; what many prompts begin with is run once for
    all. Where no cache can be shared, each answer is run with its prompt. `done` is called after each batch with
    the number of rows that it finished.
    """
    scores: list[tuple[float, ...]] = [()] * len(rows)
    for batch, prefill in prefill_batches(model, [row.prompt for row in rows], pad, config):
        totals = _totals(prefill, [rows[i] for i in batch])
        for i, of_answer in zip(batch, totals, strict=True):
            scores[i] = tuple(of_answer[answer] / len(answer) for answer in rows[i].answers)
            if not all(abs(score) < float("inf") for score in scores[i]):
                raise EvaluationError(
                    f"row {rows[i].index}: the model's log-likelihoods are not finite: {scores[i]}."
                )
        done(len(batch))
        del prefill  # or its cache would be in memory together with the next one
    return scores


def best(scores: Sequence[float]) -> int:
    """The index of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=lambda index: (scores[index], -index))


def _totals(prefill: Prefill, rows: Sequence[Row]) -> list[dict[tuple[int, ...], float]]:
    """Summed log-probabilities of every distinct answer of every row; `prefill` holds their prompts."""
    pairs = [(i, answer) for i, row in enumerate(rows) for answer in dict.fromkeys(row.answers)]
    fits = [len(prefill.prompts[i]) + len(answer) - 1 <= prefill.max_cached_length for i, answer in pairs]
    totals = dict.fromkeys(pairs, 0.0)
    # Answers that can't continue from the cache: run with their prompts.
    far = [pair for pair, fit in zip(pairs, fits, strict=True) if not fit]
    batches = uncached_continuations(prefill, [i for i, _ in far], [answer[:-1] for _, answer in far])
    for n, value in _sums(batches, [answer for _, answer in far]):
        totals[far[n]] = value
    # The others: the first token by the prompt's logits, the rest by continuing from the cache.
    near = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
    if near and prefill.logits is not None:
        owners, firsts = torch.tensor([i for i, _ in near]), torch.tensor([a[0] for _, a in near])
        totals |= zip(near, _log_probabilities(prefill.logits, owners, firsts).tolist(), strict=True)
    longer = [(i, answer) for i, answer in near if len(answer) > 1]
    batches = continuations(prefill, [i for i, _ in longer], [answer[:-1] for _, answer in longer])
    for n, value in _sums(batches, [answer[1:] for _, answer in longer]):
        totals[longer[n]] += value
    result: list[dict[tuple[int, ...], float]] = [{} for _ in rows]
    for (i, answer), total in totals.items():
        result[i][answer] = total
    return result


def _sums(batches: Iterable[LogitBatch], answers: Sequence[Sequence[int]]) -> Iterator[tuple[int, float]]:
    """The number of each answer, and the summed log-probabilities of its tokens under a batch's logits."""
    for batch, logits, positions in batches:
        tokens = torch.tensor([token for n in batch for token in answers[n]])
        values = _log_probabilities(logits, positions, tokens)
        owner = torch.repeat_interleave(torch.tensor([len(answers[n]) for n in batch]))
        sums = torch.zeros(len(batch), dtype=torch.float32).index_add(0, owner, values)
        yield from zip(batch, sums.tolist(), strict=True)


def _log_probabilities(logits: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """log p [n] in float32 on the CPU: of tokens[i] under logits[positions[i]]; logits is [anything, vocabulary]."""
    # A position's sum is computed once, however many answers use it, and no more than _CHUNK logits are
    # float32 at a time.
    used, back = positions.unique(return_inverse=True)
    step = max(1, _CHUNK // logits.shape[-1])
    sums = [logits[part.to(logits.device)].float().logsumexp(-1).cpu() for part in used.split(step)]
    picked = logits[positions.to(logits.device), tokens.to(logits.device)].float().cpu()
    return picked - torch.cat(sums)[back]
