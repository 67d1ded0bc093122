"""Rank classification: the answer whose tokens are the likeliest per token, end token included.

    score(choice) = (1 / n) Σ_{j=1..n} log p(t_j | prompt, t_1 … t_{j−1}),   t_n the end token

The highest score wins; of equal ones the first. Scores are computed from the model's logits in float32, but a bf16 model's
own rounding stays in them: against one plain forward a choice they differ by up to 0.1 nats per token there (2e-5 in
float32; a model of 135M parameters), so close choices may tie, or swap when the batches change. Choices of one row that
are equal as tokens are scored once, so they always tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import Read, Row, anew, continuations, reach
from phatgoose.evaluation.readings import readings
from phatgoose.models.base.base import decoder_start, device_of
from phatgoose.models.context.prompted import prompted
from phatgoose.models.text.capabilities import accepts_argument

_CHUNK = 2**24  # logits turned to float32 at a time


def score_choices(
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad: int,
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, ...]]:
    """Length-normalised log-likelihoods (nats per token) of each row's answers, in their order.

    Each prompt is read once and its cache shared by its answers; what many prompts begin with is read once for all. Where no cache can
    be shared, each answer is read with its prompt. `done` is told how many rows are finished.

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
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=device_of(model))
    settings = {"use_cache": False} if accepts_argument(model, "use_cache") else {}
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[decoder_start(model), *answer[:-1]]], device=ids.device)
        return model(input_ids=ids[:, : len(prompt)], decoder_input_ids=decoder, **settings).logits[0]
    return model(input_ids=ids, **settings).logits[0, len(prompt) - 1 :]


def best(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


def _totals(
    model: PreTrainedModel, before: Read, rows: Sequence[Row], pad: int, config: EvaluationConfig
) -> list[dict[tuple[int, ...], float]]:
    """Summed log-probabilities of every distinct answer of every row; `before` has read their prompts."""
    pairs = [(place, answer) for place, row in enumerate(rows) for answer in dict.fromkeys(row.answers)]
    most = reach(model, before)
    near = [len(before.prompts[place]) + len(answer) - 1 <= most for place, answer in pairs]
    totals = dict.fromkeys(pairs, 0.0)
    far = [pair for pair, is_near in zip(pairs, near, strict=True) if not is_near]
    prompts = [before.prompts[place] for place, _ in far]
    for n, value in _sums(anew(model, prompts, [a[:-1] for _, a in far], pad, config), [a for _, a in far]):
        totals[far[n]] = value
    close = [pair for pair, is_near in zip(pairs, near, strict=True) if is_near]
    if close and before.logits is not None:
        places, firsts = torch.tensor([p for p, _ in close]), torch.tensor([a[0] for _, a in close])
        totals |= zip(close, _log_probabilities(before.logits, places, firsts).tolist(), strict=True)
    longer = [(place, answer) for place, answer in close if len(answer) > 1]
    rests = [answer[:-1] for _, answer in longer]
    behind = continuations(model, before, [place for place, _ in longer], rests, pad, config)
    for n, value in _sums(behind, [answer[1:] for _, answer in longer]):
        totals[longer[n]] += value
    result: list[dict[tuple[int, ...], float]] = [{} for _ in rows]
    for (place, answer), total in totals.items():
        result[place][answer] = total
    return result


def _sums(
    batches: Iterable[tuple[list[int], Tensor, Tensor]], answers: Sequence[Sequence[int]]
) -> Iterator[tuple[int, float]]:
    """The place of each answer, and the summed log-probabilities of its tokens under the logits that a batch says."""
    for part, logits, places in batches:
        values = _log_probabilities(
            logits, places, torch.tensor([token for n in part for token in answers[n]])
        )
        owner = torch.repeat_interleave(torch.tensor([len(answers[n]) for n in part]))
        sums = torch.zeros(len(part), dtype=torch.float32).index_add(0, owner, values)
        yield from zip(part, sums.tolist(), strict=True)


def _log_probabilities(logits: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """log p [n] in float32 on the CPU: of tokens[i] under logits[places[i]]; logits is [anything, vocabulary]."""
    used, back = places.unique(return_inverse=True)
    step = max(1, _CHUNK // logits.shape[-1])
    sums = [logits[part.to(logits.device)].float().logsumexp(-1).cpu() for part in used.split(step)]
    picked = logits[places.to(logits.device), tokens.to(logits.device)].float().cpu()
    return picked - torch.cat(sums)[back]
