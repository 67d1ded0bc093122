"""Rank classification: the answer whose tokens are the likeliest per token, end token included.

    score(choice) = (1 / n) Σ_{j=1..n} log p(t_j | prompt, t_1 … t_{j−1}),   t_n the end token

The highest score wins; of equal ones the first. Scores are computed from the model's logits in float32, but a bf16 model's
own rounding stays in them: against one plain forward a choice they differ by up to 0.1 nats per token there (2e-5 in
float32; a model of 135M parameters), so close choices may tie, or swap when the batches change. Choices of one row that
are equal as tokens are scored once, so they always tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import (
    Read,
    Row,
    continuations,
)
from phatgoose.evaluation.readings import readings
from phatgoose.models.limits import decoder_start
from phatgoose.models.prompted import prompted

_CHUNK = 2**24  # logits turned to float32 at a time


def score_choices(
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad: int,
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, ...]]:
    """Length-normalised log-likelihoods (nats per token) of each row's answers, in their order.

    Each prompt is read once and its cache shared by its answers; what many prompts begin with is read once for all. `done` is told how many rows are finished.

    Raises:
        EvaluationError: naming the row, if a score is not finite.
    """
    scores: list[tuple[float, ...]] = [()] * len(rows)
    for batch, before in readings(model, [row.prompt for row in rows], pad, config):
        chosen = [rows[i] for i in batch]
        for place, row, totals in zip(
            batch, chosen, _totals(model, before, chosen, pad, config), strict=True
        ):
            scores[place] = tuple(totals[answer] / len(answer) for answer in row.answers)
            if not all(abs(score) < float("inf") for score in scores[place]):
                raise EvaluationError(
                    f"row {row.index}: the model's log-likelihoods are not finite: {scores[place]}."
                )
        done(len(batch))
        del before
    return scores


def score_choice_plainly(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The same score of one answer, by the definition: one forward over prompt and answer, no cache, no padding."""
    with prompted(model, [prompt]):
        logits = _plain_logits(model, prompt, answer)
    log_p = logits.float().log_softmax(-1)
    return float(log_p[torch.arange(len(answer)), torch.tensor(list(answer))].mean())


def _plain_logits(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits [len(answer), vocabulary] that predict the answer's tokens."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[decoder_start(model), *answer[:-1]]], device=model.device)
        ids = torch.tensor([list(prompt)], device=model.device)
        return model(input_ids=ids, decoder_input_ids=decoder).logits[0]
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    return model(input_ids=ids).logits[0, len(prompt) - 1 :]


def best(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


def _totals(
    model: PreTrainedModel, before: Read, rows: Sequence[Row], pad: int, config: EvaluationConfig
) -> list[dict[tuple[int, ...], float]]:
    """Summed log-probabilities of every distinct answer of every row; `before` has read their prompts."""
    pairs = [(place, answer) for place, row in enumerate(rows) for answer in dict.fromkeys(row.answers)]
    places, firsts = torch.tensor([p for p, _ in pairs]), torch.tensor([answer[0] for _, answer in pairs])
    totals = _log_probabilities(before.logits, places, firsts).tolist()
    longer = [n for n, (_, answer) in enumerate(pairs) if len(answer) > 1]
    for part, rest in _rests(model, before, [pairs[n] for n in longer], pad, config):
        for n, value in zip(part, rest, strict=True):
            totals[longer[n]] += value
    result: list[dict[tuple[int, ...], float]] = [{} for _ in rows]
    for (place, answer), total in zip(pairs, totals, strict=True):
        result[place][answer] = total
    return result


def _rests(
    model: PreTrainedModel,
    before: Read,
    pairs: Sequence[tuple[int, tuple[int, ...]]],
    pad: int,
    config: EvaluationConfig,
) -> Iterator[tuple[list[int], list[float]]]:
    """For groups of `pairs`: their places, and the summed log-probabilities of their answers' tokens but the first."""
    owners, answers = [row for row, _ in pairs], [answer for _, answer in pairs]
    for part, logits, places in continuations(model, before, owners, [a[:-1] for a in answers], pad, config):
        targets = torch.tensor([token for n in part for token in answers[n][1:]])
        values = _log_probabilities(logits, places, targets)
        owner = torch.repeat_interleave(torch.tensor([len(answers[n]) - 1 for n in part]))
        yield part, torch.zeros(len(part), dtype=torch.float32).index_add(0, owner, values).tolist()


def _log_probabilities(logits: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """log p [n] in float32 on the CPU: of tokens[i] under logits[places[i]]; logits is [anything, vocabulary]."""
    used, back = places.unique(return_inverse=True)
    step = max(1, _CHUNK // logits.shape[-1])
    sums = [logits[part.to(logits.device)].float().logsumexp(-1).cpu() for part in used.split(step)]
    picked = logits[places.to(logits.device), tokens.to(logits.device)].float().cpu()
    return picked - torch.cat(sums)[back]
