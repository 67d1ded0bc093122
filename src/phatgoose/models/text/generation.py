"""How answers are written: one set of settings for every command, none of them the checkpoint's own taste."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.models.base.limits import decoder_start
from phatgoose.models.text.sequences import keeps_cache


def generation_settings(
    model: PreTrainedModel,
    *,
    pad: int,
    max_new_tokens: int,
    ends: Iterable[int] = (),
    temperature: float = 0.0,
) -> GenerationConfig:
    """Settings under which `generate` takes the likeliest token, or above temperature 0 draws from softmax(logits / temperature).

    Give them to `generate` inside of `settings_are_own`: what they leave open would else be filled from the checkpoint's
    generation_config. Nothing of that is used (penalties, suppressed and forced tokens, beams, lengths, stop strings, …) but
    the decoder's start token and, through `ends`, the end tokens: the same settings train, score and serve an expert.

    Args:
        pad: the token that fills up shorter rows.
        ends: tokens that end an answer; none: it ends at `max_new_tokens`, or where the caller says.
    """
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if found := sorted(set(ends)):
        settings["eos_token_id"] = found
    if model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = decoder_start(model)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        use_cache=keeps_cache(model),
        pad_token_id=pad,
        **settings,
    )


def forced_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to know of a base whose checkpoint forces an answer's first token (BART's <s>, mBART's and NLLB's language); else None."""
    token = getattr(model.generation_config, "forced_bos_token_id", None)
    if token is None:
        return None
    return (
        f"its checkpoint forces every answer to begin with {tokenizer.convert_ids_to_tokens(token)!r}; here nothing is forced: "
        "an answer begins with the likeliest token, as in training and evaluation."
    )
