"""Scores held to the definition: one plain forward an answer."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.models.attach.attach import prompted
from phatgoose.models.base.base import decoder_start, device_of
from phatgoose.models.text.capabilities import accepts_argument


def assert_plain(model, rows, scores, within=1e-5):
    """`scores` are those of every answer of `rows`, by plain forwards, up to `within`, absolute or relative."""
    for row, found in zip(rows, scores, strict=True):
        expected = [score_choice_plainly(model, row.prompt, answer) for answer in row.answers]
        assert found == pytest.approx(expected, abs=within, rel=within)


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
