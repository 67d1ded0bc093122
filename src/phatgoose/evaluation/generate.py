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
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.batching import split_into_batches
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import continuations
from phatgoose.evaluation.prefill import Prefill, prefill_batches
from phatgoose.evaluation.rows import MatchRule, Row
from phatgoose.evaluation.uncached import uncached_logits
from phatgoose.models.base.base import context_length, device_of
from phatgoose.models.text.capabilities import generation_groups, max_mixed_length, supports_cache
from phatgoose.models.text.generate import generation_settings, run_generate
from phatgoose.records import Prediction


def match_exactly(
    model: PreTrainedModel,
    rows: Sequence[Row],
    rules: Sequence[MatchRule],
    pad: int,
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
) -> list[Prediction]:
    """One prediction a row, by teacher forcing where that decides and by `generate` where it doesn't.

    A row's answers are its targets as tokens, each with the end token. `done` is called after each batch with the
    number of rows that it finished.

    Raises:
        EvaluationError: naming the row, if a logit that decides is not finite.
    """
    found: list[Prediction | None] = [None] * len(rows)
    for batch, prefill in prefill_batches(model, [row.prompt for row in rows], pad, config):
        paths = _greedy_paths(prefill, [rows[i] for i in batch], config)
        for i, path in zip(batch, paths, strict=True):
            found[i] = rules[i].judge(path[: rules[i].limit])
        done(sum(found[i] is not None for i in batch))
        del prefill  # or its cache would be in memory together with the next one
    undecided = [i for i, prediction in enumerate(found) if prediction is None]
    generated = generate(
        model, [rows[i] for i in undecided], [rules[i] for i in undecided], pad, config, done
    )
    for i, prediction in zip(undecided, generated, strict=True):
        found[i] = prediction
    return [prediction for prediction in found if prediction is not None]


def generate(
    model: PreTrainedModel,
    rows: Sequence[Row],
    rules: Sequence[MatchRule],
    pad: int,
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
    *,
    to_the_end: bool = False,
) -> list[Prediction]:
    """One prediction a row, by the model's own greedy generate(); a row stops early as `MatchRule.judge` allows.

    Nothing of the checkpoint's generation settings (sampling, penalties, suppressed tokens, lengths) is used, but its
    end tokens and its decoder's start token.

    Raises:
        EvaluationError: naming the row, if a logit that decides is not finite.
    """
    found: dict[int, Prediction] = {}
    longest = max((rule.limit for rule in rules), default=0)
    limits = [(0, config.tokens_for(device_of(model))), (longest, config.cache_tokens)]
    for part in split_into_batches([len(row.prompt) for row in rows], limits, config.batch_rows):
        for batch in _split_for_generate(model, part, rows, rules):
            judge = _StopAtVerdict([rows[i] for i in batch], [rules[i] for i in batch], to_the_end)
            _run_generate(model, judge, pad)
            found |= zip(batch, judge.verdicts(), strict=True)
            done(len(batch))
    return [found[i] for i in range(len(rows))]


def _greedy_paths(prefill: Prefill, rows: Sequence[Row], config: EvaluationConfig) -> list[list[int]]:
    """The tokens that greedy decoding would start with: along a row's targets as far as it follows one, and
    one more."""
    model, logits = prefill.model, prefill.logits
    if logits is None:
        logits = uncached_logits(model, prefill.prompts, [()] * len(rows), prefill.pad)[:, 0]
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
    for batch, logits, positions in continuations(prefill, owners, rests, config):
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


def _split_for_generate(
    model: PreTrainedModel, batch: list[int], rows: Sequence[Row], rules: Sequence[MatchRule]
) -> list[list[int]]:
    """`batch` in parts that one `generate` call may take.

    Row by row where a row, continued up to another's longer limit, would leave the context; rows of one length
    where the model would read the padding.
    """
    if model.config.is_encoder_decoder:
        return [batch]
    context = context_length(model)
    need = max(len(rows[i].prompt) for i in batch) + max(rules[i].limit for i in batch)
    if context is not None and need > context:
        return [[i] for i in batch]
    parts = generation_groups(model, [rows[i].prompt for i in batch], max(rules[i].limit for i in batch))
    return [[batch[i] for i in part] for part in parts]


def _run_generate(model: PreTrainedModel, judge: _StopAtVerdict, pad: int) -> None:
    prompts = [row.prompt for row in judge.rows]
    judge.start = 1 if model.config.is_encoder_decoder else max(map(len, prompts))
    settings = generation_settings(
        model,
        pad=pad,
        max_new_tokens=max(rule.limit for rule in judge.rules),
        ends=(end for rule in judge.rules for end in rule.ends),
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
        logits_processor=LogitsProcessorList([_RefuseNonFinite(judge)]),
    )


class _StopAtVerdict(StoppingCriteria):
    """Stops each row as soon as its rule has a verdict, and keeps the verdict."""

    def __init__(self, rows: Sequence[Row], rules: Sequence[MatchRule], to_the_end: bool) -> None:
        self.rows, self.rules, self.to_the_end = rows, rules, to_the_end
        self.start = 0
        self.found: list[Prediction | None] = [None] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for i, tokens in enumerate(input_ids[:, self.start :].tolist()):
            if self.found[i] is None:
                self.found[i] = self.rules[i].judge(tokens, to_the_end=self.to_the_end)
        return torch.tensor([prediction is not None for prediction in self.found], device=input_ids.device)

    def verdicts(self) -> list[Prediction]:
        verdicts = [prediction for prediction in self.found if prediction is not None]
        if len(verdicts) < len(self.found):
            raise EvaluationError(
                f"{len(self.found) - len(verdicts)} rows have no verdict: generate() stopped before its limit."
            )
        return verdicts


class _RefuseNonFinite(LogitsProcessor):
    """Refuses logits that aren't finite, of rows without a verdict. Changes nothing."""

    def __init__(self, judge: _StopAtVerdict) -> None:
        self.judge = judge

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        undecided = [i for i, found in enumerate(self.judge.found) if found is None]
        _argmax(scores[undecided], [self.judge.rows[i] for i in undecided])
        return scores
