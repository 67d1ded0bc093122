"""What a request asks of the engine: answer length, sampling, and what is reported."""

from __future__ import annotations

from collections.abc import Sequence

from phatgoose.models.base.base import Base
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import AnswerRequest, ChatRequest, CompletionRequest
from phatgoose.serving.engine.sampling import SamplingParams
from phatgoose.serving.prompts import Prompts, context_length_exceeded
from phatgoose.serving.settings import ServeSettings

MAX_REPORTED = 2**19
"""The most log-probabilities in one response, about 30 MB. A token has its own and those of its likeliest rivals."""


def max_new_tokens(
    request: AnswerRequest, prompt: Sequence[int], settings: ServeSettings, limit: int | None
) -> int:
    """How many tokens the answer to this prompt may have.

    Args:
        limit: for prompt and answer together; None: they don't share a context (encoder–decoders).

    Raises:
        APIError: the prompt is too long, or it asks for more tokens than are allowed or than fit behind it.
    """
    asked, name = _requested_tokens(request)
    most, param = settings.max_tokens, "messages" if isinstance(request, ChatRequest) else "prompt"
    if asked is not None and asked > most:
        raise APIError(400, f"{name}: at most {most} tokens are written in an answer.", param=name)
    if limit is None:
        if len(prompt) > settings.max_prompt_tokens:
            raise context_length_exceeded(f"{len(prompt)} tokens", settings.max_prompt_tokens, param=param)
        return most if asked is None else asked
    left = limit - len(prompt)
    if left < (1 if asked is None else max(asked, 1)):
        answer = f", and its answer may have {asked}" if asked else ""
        raise context_length_exceeded(f"a prompt of {len(prompt)} tokens{answer}", limit, param=param)
    return min(most, left) if asked is None else asked


def _requested_tokens(request: AnswerRequest) -> tuple[int | None, str]:
    """How many tokens a request asks for, and the parameter that says so."""
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            return request.max_completion_tokens, "max_completion_tokens"
        return request.max_tokens, "max_tokens"
    assert isinstance(request, CompletionRequest)
    return 16 if request.max_tokens is None else request.max_tokens, "max_tokens"


def top_prompt_logprobs(request: AnswerRequest) -> int | None:
    """How many likeliest tokens are reported for each prompt token; None: the prompt isn't scored."""
    echoed = request.logprobs if isinstance(request, CompletionRequest) and request.echo else None
    return max((n for n in (echoed, request.prompt_logprobs) if n is not None), default=None)


def check_encoder_decoder(request: AnswerRequest, base: Base) -> None:
    """Refuses parameters that make no sense for an encoder–decoder's prompt."""
    if not base.is_encoder_decoder:
        return
    if isinstance(request, CompletionRequest) and request.echo:
        raise APIError(400, "echo: the prompt isn't a part of what an encoder–decoder writes.", param="echo")
    if request.prompt_logprobs is not None:
        why = "prompt_logprobs: an encoder–decoder doesn't predict its prompt."
        raise APIError(400, why, param="prompt_logprobs")


def check_reported(
    request: AnswerRequest, params: SamplingParams, prompt_tokens: int, new_tokens: int
) -> None:
    """Refuses to report so many log-probabilities that other clients would have to wait.

    Args:
        prompt_tokens, new_tokens: over all answers; of new tokens the most that there may be.
    """
    reported = sum(
        tokens * (1 + top)
        for tokens, top in ((prompt_tokens, top_prompt_logprobs(request)), (new_tokens, params.logprobs))
        if top is not None
    )
    if reported > MAX_REPORTED:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        why = (
            f"{param}: {reported} log-probabilities are asked for, and at most {MAX_REPORTED} are reported in a "
            "response: ask for fewer prompts, answers, tokens or likeliest tokens at a time."
        )
        raise APIError(400, why, param=param)


async def sampling_params(
    request: AnswerRequest, prompts: Prompts, end_tokens: frozenset[int], limit: int
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
    stops, allowed = request.stop_token_ids, request.allowed_token_ids
    for param, tokens in (
        ("logit_bias", list(bias)),
        ("stop_token_ids", stops),
        ("allowed_token_ids", allowed),
    ):
        if tokens:
            prompts.check_tokens(tokens, param)
    if isinstance(request, ChatRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        assert isinstance(request, CompletionRequest)
        logprobs = request.logprobs
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        logprobs=logprobs,
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        min_tokens=request.min_tokens or 0,
        end_tokens=end_tokens | frozenset(stops or ()),
        bad_words=await prompts.encode_bad_words(request.bad_words or ()),
        allowed=None if allowed is None else tuple(sorted(set(allowed))),
    )
