"""What a request asks of the engine: answer length, sampling, and what is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from phatgoose.models.base.base import Base
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import ChatOrCompletion, ChatRequest, CompletionRequest
from phatgoose.serving.engine.sampling import SamplingParams
from phatgoose.serving.prompts import Prompts, context_length_exceeded
from phatgoose.serving.settings import ServeSettings

MAX_REPORTED = 2**19
"""The most log-probabilities in one response, about 30 MB. A token has its own and those of its likeliest rivals."""


def max_new_tokens(
    request: ChatOrCompletion, prompt: Sequence[int], settings: ServeSettings, limit: int | None
) -> int:
    """How many tokens the answer to this prompt may have.

    Args:
        limit: for prompt and answer together; None: they don't share a context (encoder–decoders).

    Raises:
        APIError: the prompt is too long, or it asks for more tokens than are allowed or than fit behind it.
    """
    asked, name, param = request.max_tokens, "max_tokens", "prompt"
    if isinstance(request, CompletionRequest):
        asked = 16 if asked is None else asked
    else:
        param = "messages"
        if request.max_completion_tokens is not None:
            asked, name = request.max_completion_tokens, "max_completion_tokens"
    most = settings.max_tokens
    if asked is not None and asked > most:
        raise APIError(400, f"{name}: at most {most} tokens are written in an answer.", param=name)
    if limit is None:
        if len(prompt) > settings.max_prompt_tokens:
            raise context_length_exceeded(f"{len(prompt)} tokens", settings.max_prompt_tokens, param=param)
        return most if asked is None else asked
    left = limit - len(prompt)
    if left < max(asked or 1, 1):
        answer = f", and its answer may have {asked}" if asked else ""
        raise context_length_exceeded(f"a prompt of {len(prompt)} tokens{answer}", limit, param=param)
    return min(most, left) if asked is None else asked


def top_prompt_logprobs(request: ChatOrCompletion) -> int | None:
    """How many likeliest tokens are reported for each prompt token; None: the prompt isn't scored."""
    echoed = request.logprobs if isinstance(request, CompletionRequest) and request.echo else None
    return max((n for n in (echoed, request.prompt_logprobs) if n is not None), default=None)


def check_encoder_decoder(request: ChatOrCompletion, base: Base) -> None:
    """Refuses parameters that make no sense for an encoder–decoder's prompt."""
    if not base.is_encoder_decoder:
        return
    if isinstance(request, CompletionRequest) and request.echo:
        raise APIError(400, "echo: the prompt isn't a part of what an encoder–decoder writes.", param="echo")
    if request.prompt_logprobs is not None:
        why = "prompt_logprobs: an encoder–decoder doesn't predict its prompt."
        raise APIError(400, why, param="prompt_logprobs")


def check_reported(
    request: ChatOrCompletion, params: SamplingParams, prompt_tokens: int, new_tokens: int
) -> None:
    """Refuses to report so many log-probabilities that other clients would have to wait.

    Args:
        prompt_tokens, new_tokens: over all answers; of new tokens the most that there may be.
    """
    counts = ((prompt_tokens, top_prompt_logprobs(request)), (new_tokens, params.logprobs))
    reported = sum(tokens * (1 + top) for tokens, top in counts if top is not None)
    if reported > MAX_REPORTED:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        why = (
            f"{param}: {reported} log-probabilities are asked for, and at most {MAX_REPORTED} are reported in a "
            "response: ask for fewer prompts, answers, tokens or likeliest tokens at a time."
        )
        raise APIError(400, why, param=param)


async def sampling_params(
    request: ChatOrCompletion, prompts: Prompts, end_tokens: frozenset[int], limit: int
) -> SamplingParams:
    """How a request's tokens are sampled.

    Args:
        end_tokens: the model's own. limit: the most tokens of the shortest answer.

    Raises:
        APIError: it names a token that the model lacks, or min_tokens is larger than an answer may be.
    """
    if (request.min_tokens or 0) > limit:
        why = f"min_tokens is {request.min_tokens}, and an answer may have {limit}."
        raise APIError(400, why, param="min_tokens")
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise APIError(400, "logit_bias: its keys are token ids, whole numbers.", param="logit_bias")
        bias[int(key)] = value
    stops, allowed = request.stop_token_ids or (), request.allowed_token_ids
    named = {"logit_bias": list(bias), "stop_token_ids": stops, "allowed_token_ids": allowed}
    for param, tokens in named.items():
        if tokens:
            prompts.check_tokens(tokens, param)
    logprobs = request.logprobs
    if isinstance(request, ChatRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    # Parameters are taken as they are by their names, where they are given, but for these.
    given: dict[str, Any] = {f.name: getattr(request, f.name, None) for f in fields(SamplingParams)}
    given |= {
        "logit_bias": bias,
        "logprobs": logprobs,
        "top_k": max(request.top_k or 0, 0),
        "end_tokens": end_tokens | frozenset(stops),
        "bad_words": await prompts.encode_bad_words(request.bad_words or ()),
        "allowed": None if allowed is None else tuple(sorted(set(allowed))),
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
