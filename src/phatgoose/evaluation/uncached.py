"""Prompt and answer in one forward without a cache, for models that can't share one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import BaseModelError, EvaluationError
from phatgoose.models.attach.attach import prompted, routing_of
from phatgoose.models.base.base import device_of
from phatgoose.models.text.batch import collate, target_logits
from phatgoose.models.text.capabilities import check_scorable, supports_left_padding
from phatgoose.models.text.encoding import Encoded

_CHECKED = "_phatgoose_rows_checked"


def uncached_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Logits [n, 1 + longest, vocabulary] after prompt i, and after each token of `answers[i]` that follows it.

    Raises:
        EvaluationError: the model's scores would mean nothing (`check_scorable`).
    """
    check_scorable_once(model)
    seq2seq = bool(model.config.is_encoder_decoder)
    # What follows an answer's last token is predicted at a token that is never read: the padding token.
    rows = [Encoded(tuple(p), (*a, pad)) for p, a in zip(prompts, answers, strict=True)]
    batch = collate(rows, pad, is_encoder_decoder=seq2seq, left=supports_left_padding(model))
    with prompted(model, prompts):
        logits = target_logits(model, {name: tensor.to(device_of(model)) for name, tensor in batch.items()})
    if seq2seq:
        return logits
    # Decoder-only targets end in the last column: move each row's logits to the front.
    width = logits.shape[1]
    starts = torch.tensor([width - len(row.target_ids) for row in rows])
    columns = (starts[:, None] + torch.arange(width)).clamp(max=width - 1).to(logits.device)
    return logits[torch.arange(len(rows), device=logits.device)[:, None], columns]


def check_scorable_once(model: PreTrainedModel) -> None:
    """Runs `check_scorable` on the base alone, without routing and trace, the first time it is called for a model."""
    if model.__dict__.get(_CHECKED):
        return
    routing = routing_of(model)
    recorder = None if routing is None else routing.recorder
    if routing is not None:
        routing.detach()
    try:
        check_scorable(model)
    except BaseModelError as cause:
        raise EvaluationError(str(cause)) from cause
    finally:
        if routing is not None:
            routing.attach()
            routing.record(recorder)
    model.__dict__[_CHECKED] = True
