"""What a request asks of the engine: how long an answer may be, how its tokens are drawn, how much is reported."""

from __future__ import annotations

from collections.abc import Sequence

from phatgoose.models.base.base import Base
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import AnswerRequest, ChatRequest, CompletionRequest
from phatgoose.serving.engine.sampling import Sampling
from phatgoose.serving.prompts import Prompts, too_long
from phatgoose.serving.settings import ServeSettings

MAX_REPORTED = 2**19
"""Log-probabilities that one response reports: of every token that of the token itself and of the likeliest in its place. They make
about 30 MB."""


def room(request: AnswerRequest, prompt: Sequence[int], settings: ServeSettings, limit: int | None) -> int:
    """How many tokens an answer may have.

    Args:
        limit: of prompt and answer together; None: they don't share a context (encoder–decoders).

    Raises:
        APIError: the prompt is too long, or more tokens are asked for than are given, or than fit behind it.
    """
    asked, name = _asked(request)
    most, param = settings.max_tokens, "messages" if isinstance(request, ChatRequest) else "prompt"
    if asked is not None and asked > most:
        raise APIError(400, f"{name}: at most {most} tokens are written in an answer.", param=name)
    if limit is None:
        if len(prompt) > settings.max_prompt_tokens:
            raise too_long(f"{len(prompt)} tokens", settings.max_prompt_tokens, param=param)
        return most if asked is None else asked
    behind = limit - len(prompt)
    if behind < (1 if asked is None else max(asked, 1)):
        answer = f", and its answer may have {asked}" if asked else ""
        raise too_long(f"a prompt of {len(prompt)} tokens{answer}", limit, param=param)
    return min(most, behind) if asked is None else asked


def _asked(request: AnswerRequest) -> tuple[int | None, str]:
    """How many tokens a request asks for, and the parameter that says so."""
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            return request.max_completion_tokens, "max_completion_tokens"
        return request.max_tokens, "max_tokens"
    assert isinstance(request, CompletionRequest)
    return 16 if request.max_tokens is None else request.max_tokens, "max_tokens"


def scored(request: AnswerRequest) -> int | None:
    """How many likeliest tokens are reported in place of each token of the prompt; None: the prompt isn't scored."""
    echoed = request.logprobs if isinstance(request, CompletionRequest) and request.echo else None
    return max((n for n in (echoed, request.prompt_logprobs) if n is not None), default=None)


def check_prompt(request: AnswerRequest, base: Base) -> None:
    """Refuses what can't be said of an encoder–decoder's prompt."""
    if not base.is_encoder_decoder:
        return
    if isinstance(request, CompletionRequest) and request.echo:
        raise APIError(400, "echo: the prompt isn't a part of what an encoder–decoder writes.", param="echo")
    if request.prompt_logprobs is not None:
        raise APIError(
            400, "prompt_logprobs: an encoder–decoder doesn't predict its prompt.", param="prompt_logprobs"
        )


def check_reported(request: AnswerRequest, sampling: Sampling, prompts: int, tokens: int) -> None:
    """Refuses to report more log-probabilities than can be written while others are answered.

    Args:
        prompts: tokens of all answers' prompts. tokens: the most that all answers may have.
    """
    score, top = scored(request), sampling.logprobs
    reported = (0 if score is None else prompts * (1 + score)) + (0 if top is None else tokens * (1 + top))
    if reported > MAX_REPORTED:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        raise APIError(
            400, f"{param}: {reported} log-probabilities are asked for, and at most {MAX_REPORTED} are reported in a response: ask for "
            "fewer prompts, answers, tokens or likeliest tokens at a time.", param=param,
        )  # fmt: skip


async def sampling_of(request: AnswerRequest, prompts: Prompts, ends: frozenset[int], limit: int) -> Sampling:
    """A request's way of drawing tokens.

    Args:
        ends: the model's own end tokens. limit: the fewest tokens that one of the answers may have.

    Raises:
        APIError: a token that the model doesn't have, or more tokens at least than an answer may have.
    """
    if (request.min_tokens or 0) > limit:
        raise APIError(
            400, f"min_tokens is {request.min_tokens}, and an answer may have {limit}.", param="min_tokens"
        )
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise APIError(400, "logit_bias: its keys are token ids, whole numbers.", param="logit_bias")
        bias[int(key)] = value
    for param, tokens in (
        ("logit_bias", bias),
        ("stop_token_ids", request.stop_token_ids),
        ("allowed_token_ids", request.allowed_token_ids),
    ):
        if tokens:
            prompts.check(list(tokens), param)
    if isinstance(request, ChatRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        assert isinstance(request, CompletionRequest)
        logprobs = request.logprobs
    return Sampling(
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
        ends=ends | frozenset(request.stop_token_ids or ()),
        bad_words=await prompts.words(request.bad_words or ()),
        allowed=None if request.allowed_token_ids is None else tuple(sorted(set(request.allowed_token_ids))),
    )
