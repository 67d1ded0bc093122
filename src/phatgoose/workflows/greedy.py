"""One plain greedy answer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from phatgoose.evaluation.continuations import decoder_start
from phatgoose.evaluation.generate import end_tokens, settings_are_own
from phatgoose.models.base import Base
from phatgoose.tasks.batch import pad_id


def greedy_answer(base: Base, ids: Tensor, max_new_tokens: int) -> Tensor:
    """A plain greedy answer behind ids [1, T], without the checkpoint's own penalties and suppressions: int64 [1, …].

    Behind a prompt (of an encoder–decoder: behind its decoder's start token) stands the answer, with its end token if it ended.
    """
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
        "pad_token_id": pad_id(base.tokenizer),
        "eos_token_id": sorted(end_tokens(base.model, base.tokenizer.eos_token_id)),
    }
    if base.is_encoder_decoder:
        settings["decoder_start_token_id"] = decoder_start(base.model)
    own = GenerationConfig(**settings)
    with settings_are_own(base.model, own), torch.no_grad():
        run: Any = base.model.generate
        return cast(Tensor, run(inputs=ids, attention_mask=torch.ones_like(ids), generation_config=own))
