"""Generation settings, the same for every command, and the plain greedy answer.

Nothing of a checkpoint's generation_config is used except the decoder's start token and the end tokens: the same
settings train, score and serve an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import StoppingCriteriaList

from phatgoose.errors import PhatgooseError
from phatgoose.models.base.base import Base, context_length, decoder_start, device_of, end_tokens
from phatgoose.models.text.batch import pad_id, pad_rows
from phatgoose.models.text.capabilities import supports_cache


def generation_settings(
    model: PreTrainedModel,
    *,
    pad: int,
    max_new_tokens: int,
    ends: Iterable[int] = (),
    temperature: float = 0.0,
) -> GenerationConfig:
    """Settings for `generate`: greedy, or above temperature 0 sampling from softmax(logits / temperature).

    Pass them to `run_generate`, or `generate` fills what they leave open from the checkpoint's generation_config:
    penalties, suppressed and forced tokens, beams, lengths, stop strings.

    Args:
        pad: the token that fills shorter rows.
        ends: tokens that end an answer. Without any it ends at `max_new_tokens`, or when the caller stops it.
    """
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if found := sorted(set(ends)):
        settings["eos_token_id"] = found
    if model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = decoder_start(model)
    cache = supports_cache(model)
    return GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=1, use_cache=cache, pad_token_id=pad, **settings
    )


def answer_settings(base: Base, max_new_tokens: int, temperature: float = 0.0) -> GenerationConfig:
    """`generation_settings` for an answer that ends with the checkpoint's end tokens or the tokenizer's."""
    ends = end_tokens(base.model, base.tokenizer.eos_token_id)
    pad = pad_id(base.tokenizer)
    return generation_settings(
        base.model, pad=pad, max_new_tokens=max_new_tokens, ends=ends, temperature=temperature
    )


def run_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig, **options: Any
) -> Tensor:
    """`generate` after these prompts, with nothing of the checkpoint's own settings: int64 [prompts, …].

    Decoder-only: the prompts, padded on the left, then the answers. Encoder–decoder: the decoder's start token, then
    the answers. `options` are further arguments of `generate`.
    """
    ids, mask = pad_rows(prompts, int(settings.pad_token_id), left=not model.config.is_encoder_decoder)
    ids, mask = ids.to(device_of(model)), mask.to(device_of(model))
    run: Any = model.generate
    # `generate` takes from the model's own settings what its arguments leave open.
    kept, model.generation_config = model.generation_config, settings
    try:
        return cast(Tensor, run(inputs=ids, attention_mask=mask, generation_config=settings, **options))
    finally:
        model.generation_config = kept


def greedy_answer(
    base: Base, ids: Tensor, max_new_tokens: int, after_each: Callable[[Tensor], bool] | None = None
) -> Tensor:
    """A greedy answer to ids [1, T], as `run_generate` returns it. An answer that ended includes its end token.

    Args:
        after_each: called after each token with the result so far; returning True ends the answer.
    """
    criteria = StoppingCriteriaList()
    if after_each is not None:
        criteria.append(lambda out, _, **__: torch.full((len(out),), after_each(out), device=out.device))
    settings = answer_settings(base, max_new_tokens)
    return run_generate(base.model, ids.tolist(), settings, stopping_criteria=criteria)


def max_answer_tokens(base: Base, tokens: int, max_new_tokens: int) -> int:
    """`max_new_tokens`, or less if the context has less room after a prompt of `tokens`; without any an error."""
    context = None if base.is_encoder_decoder else context_length(base.model)
    room = max_new_tokens if context is None else context - tokens
    if room < 1:
        raise PhatgooseError(
            f"the prompt has {tokens} tokens and the model's context {context}: nothing can be added. Shorten it."
        )
    return min(room, max_new_tokens)
