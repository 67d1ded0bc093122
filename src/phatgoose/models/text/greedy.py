"""One plain greedy answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import StoppingCriteriaList

from phatgoose.models.base.base import Base
from phatgoose.models.base.limits import end_tokens, settings_are_own
from phatgoose.models.text.batch import pad_id
from phatgoose.models.text.generation import generation_settings


def greedy_answer(
    base: Base, ids: Tensor, max_new_tokens: int, after_each: Callable[[Tensor], bool] | None = None
) -> Tensor:
    """A plain greedy answer behind ids [1, T], without the checkpoint's own penalties and suppressions: int64 [1, …].

    Behind a prompt (of an encoder–decoder: behind its decoder's start token) stands the answer, with its end token if it ended.

    Args:
        after_each: called after each token with all that is there, as it will be returned; True ends the answer there.
    """
    own = generation_settings(
        base.model,
        pad=pad_id(base.tokenizer),
        max_new_tokens=max_new_tokens,
        ends=end_tokens(base.model, base.tokenizer.eos_token_id),
    )
    with settings_are_own(base.model, own), torch.no_grad():
        run: Any = base.model.generate
        watched = StoppingCriteriaList([] if after_each is None else [_Watch(after_each)])
        mask = torch.ones_like(ids)
        out = run(inputs=ids, attention_mask=mask, generation_config=own, stopping_criteria=watched)
        return cast(Tensor, out)


class _Watch(StoppingCriteria):
    def __init__(self, after_each: Callable[[Tensor], bool]) -> None:
        self.after_each = after_each

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.after_each(input_ids), device=input_ids.device)
