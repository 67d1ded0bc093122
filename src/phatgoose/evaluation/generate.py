"""Exact match of greedy generation, mostly without generating.

Greedy decoding yields a target if and only if each of its tokens is the argmax after the ones before, and an
end token is the argmax after all of them. So all targets of a row are run after its prompt in one forward
(teacher forcing). The argmaxes tell the greedy path up to the first token where it leaves the target that it
follows longest. If the path ends there, or its text can no longer become any target, the row is decided. If it
still can (the target in other tokens, a leading space), the row is generated. Both ways judge tokens by the
same `MatchRule`, so they agree wherever the two forwards agree on the argmax: in fp32 outside of near-ties of
about 1e-5. In bf16 logits have 8 bits and ties are common; the first of equal logits is taken, and another
batch or a cache may change a row's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.batching import split_into_batches
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import continuations, uncached_logits
from phatgoose.evaluation.prefill import Prefill, prefill_batches
from phatgoose.evaluation.rows import OpenRow, Row
from phatgoose.models.base.base import context_length, device_of
from phatgoose.models.text.capabilities import generation_groups, max_mixed_length, supports_cache
from phatgoose.models.text.generate import generation_settings, run_generate
from phatgoose.records import Prediction


def match_exactly(
    model: PreTrainedModel,
    rows: Sequence[OpenRow],
    pad: int,
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
) -> list[Prediction]:
    """One prediction per row, by teacher forcing where that decides and by `generate` where it doesn't.

    A row's answers are its targets as tokens, each with the end token. `done` is called after each batch with the
    number of rows that it finished.
    """
    found: dict[int, Prediction] = {}
    for batch, prefill in prefill_batches(model, [row.prompt for row in rows], pad, config):
        decided = len(found)
        for i, path in zip(batch, _greedy_paths(prefill, [rows[i] for i in batch]), strict=True):
            if (verdict := rows[i].rule.judge(path[: rows[i].rule.limit])) is not None:
                found[i] = verdict
        done(len(found) - decided)
        del prefill  # or its cache would be in memory together with the next one
    undecided = [i for i in range(len(rows)) if i not in found]
    found |= zip(undecided, generate(model, [rows[i] for i in undecided], pad, config, done), strict=True)
    return [found[i] for i in range(len(rows))]


def generate(
    model: PreTrainedModel,
    rows: Sequence[OpenRow],
    pad: int,
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
    *,
    to_the_end: bool = False,
) -> list[Prediction]:
    """One prediction per row, by the model's own greedy generate(); a row stops early as `MatchRule.judge` allows.

    Nothing of the checkpoint's generation settings (sampling, penalties, suppressed tokens, lengths) is used, but its
    end tokens and its decoder's start token.
    """
    found: dict[int, Prediction] = {}
    longest = max((row.rule.limit for row in rows), default=0)
    limits = [(0, config.tokens_for(device_of(model))), (longest, config.cache_tokens)]
    for part in split_into_batches([len(row.prompt) for row in rows], limits, config.batch_rows):
        for batch in _split_for_generate(model, part, rows):
            judge = _StopAtVerdict([rows[i] for i in batch], to_the_end)
            _run_generate(model, judge, pad)
            found |= zip(batch, judge.verdicts(), strict=True)
            done(len(batch))
    return [found[i] for i in range(len(rows))]


def _greedy_paths(prefill: Prefill, rows: Sequence[Row]) -> list[list[int]]:
    """The tokens that greedy decoding would start with: along a row's targets as far as it follows one, and
    one more."""
    model, logits = prefill.model, prefill.logits
    if logits is None:
        logits = uncached_logits(prefill, range(len(rows)), [()] * len(rows))[:, 0]
    paths = [[token] for token in _argmax(logits, rows).tolist()]
    # Only targets that the first token hasn't left yet, that don't end with it, and that may be run in one forward.
    most = max_mixed_length(model) if supports_cache(model) else 0
    pairs = [
        (i, target)
        for i, row in enumerate(rows)
        for target in dict.fromkeys(row.answers)
        if len(target) > 1 and target[0] == paths[i][0] and len(row.prompt) + len(target) - 1 <= most
    ]
    owners, rests = [i for i, _ in pairs], [target[:-1] for _, target in pairs]
    for batch, logits, positions in continuations(prefill, owners, rests):
        asked = [rows[owners[n]] for n in batch for _ in rests[n]]
        nexts = iter(_argmax(logits[positions.to(logits.device)], asked).tolist())
        for i, target in (pairs[n] for n in batch):
            argmax = list(islice(nexts, len(target) - 1))
            same = next((j for j in range(1, len(target)) if argmax[j - 1] != target[j]), len(target) - 1)
            paths[i] = max(paths[i], [*target[:same], argmax[same - 1]], key=len)
    return paths


def _argmax(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The first of the highest of each row's logits [n, vocabulary], on the CPU. Refuses logits that aren't finite."""
    chosen = logits.argmax(-1)
    # argmax takes a NaN for the highest, so if the picked value is finite, all are.
    finite = logits.gather(-1, chosen[..., None]).squeeze(-1).isfinite().cpu()
    if not finite.all():
        row = rows[int(torch.where(~finite)[0][0])]
        raise EvaluationError(f"row {row.index}: the model's logits are not finite.")
    return chosen.cpu()


def _split_for_generate(model: PreTrainedModel, batch: list[int], rows: Sequence[OpenRow]) -> list[list[int]]:
    """`batch` in parts that one `generate` call may take.

    Row by row where a row, continued up to another's longer limit, would leave the context; rows of one length
    where the model would read the padding.
    """
    if model.config.is_encoder_decoder:
        return [batch]
    context, prompts = context_length(model), [rows[i].prompt for i in batch]
    limit = max(rows[i].rule.limit for i in batch)
    if context is not None and max(map(len, prompts)) + limit > context:
        return [[i] for i in batch]
    parts = generation_groups(model, prompts, limit)
    return [[batch[i] for i in part] for part in parts]


def _run_generate(model: PreTrainedModel, judge: _StopAtVerdict, pad: int) -> None:
    prompts = [row.prompt for row in judge.rows]
    judge.start = 1 if model.config.is_encoder_decoder else max(map(len, prompts))
    settings = generation_settings(
        model,
        pad=pad,
        max_new_tokens=max(row.rule.limit for row in judge.rows),
        ends=(end for row in judge.rows for end in row.rule.ends),
    )
    if not model.config.is_encoder_decoder:
        lengths = [len(prompt) for prompt in prompts]
        settings.use_cache = supports_cache(
            model, min(lengths), max(lengths) + int(settings.max_new_tokens or 0)
        )
    run_generate(
        model,
        prompts,
        settings,
        stopping_criteria=StoppingCriteriaList([judge]),
        logits_processor=LogitsProcessorList([judge.check]),
    )


class _StopAtVerdict(StoppingCriteria):
    """Stops each row as soon as its rule has a verdict, and keeps the verdict."""

    def __init__(self, rows: Sequence[OpenRow], to_the_end: bool) -> None:
        self.rows, self.to_the_end = rows, to_the_end
        self.start = 0
        self.found: list[Prediction | None] = [None] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for i, tokens in enumerate(input_ids[:, self.start :].tolist()):
            if self.found[i] is None:
                self.found[i] = self.rows[i].rule.judge(tokens, to_the_end=self.to_the_end)
        return torch.tensor([prediction is not None for prediction in self.found], device=input_ids.device)

    def verdicts(self) -> list[Prediction]:
        verdicts = [prediction for prediction in self.found if prediction is not None]
        if len(verdicts) < len(self.found):
            raise EvaluationError(
                f"{len(self.found) - len(verdicts)} rows have no verdict: generate() stopped before its limit."
            )
        return verdicts

    def check(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that changes nothing: it refuses logits that aren't finite, of rows without a verdict."""
        undecided = [i for i, found in enumerate(self.found) if found is None]
        _argmax(scores[undecided], [self.rows[i] for i in undecided])
        return scores
