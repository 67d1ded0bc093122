"""What a request asks of the engine: prompt tokens, answer length, sampling, and what is reported.

Prompts are tokenized in threads of their own, so that a long one doesn't hold up others.
"""

from __future__ import annotations

import asyncio
import copy
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeVar

from phatgoose.errors import TaskError
from phatgoose.models.base.base import Base
from phatgoose.models.text.conversation import conversation_ids
from phatgoose.models.text.encoding import prompt_ids
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import ChatOrCompletion, ChatRequest, CompletionRequest, Message
from phatgoose.serving.engine.sampling import SamplingParams
from phatgoose.serving.errors import client_message
from phatgoose.serving.settings import ServeSettings

T = TypeVar("T")
_ALPHANUMERIC = (string.ascii_letters + string.digits).encode()
LONG = 8192
"""Texts of this many characters or more wait for other long ones."""
MAX_REPORTED = 2**19
"""The most log-probabilities in one response, about 30 MB. A token has its own and those of its likeliest rivals."""


class Prompts:
    """Tokenizes as training and evaluation do, and refuses what has no tokens or too many by an APIError.

    Long texts have a thread and a copy of the tokenizer of their own, so short ones never wait for them.

    Args:
        limit: the most tokens of a prompt. A text that must have more by its length alone isn't tokenized.
    """

    def __init__(self, base: Base, limit: int = 2**31):
        self.base, self.limit = base, limit
        embedding: Any = base.model.get_input_embeddings()
        self.vocabulary = int(embedding.weight.shape[0])
        self._local = threading.local()
        self._short = ThreadPoolExecutor(1, "phatgoose-tokenizer")
        self._long = ThreadPoolExecutor(1, "phatgoose-tokenizer-long", initializer=self._copy_tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the current thread may use."""
        return getattr(self._local, "tokenizer", self.base.tokenizer)

    def _copy_tokenizer(self) -> None:
        self._local.tokenizer = copy.deepcopy(self.base.tokenizer)

    async def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a completion's prompt, given as text or as tokens."""
        if not isinstance(prompt, str):
            self.check_tokens(prompt, "prompt")
            return list(prompt)
        self.check_length(prompt, "prompt")
        return await self._run(lambda: self._encode(prompt), len(prompt))

    def _encode(self, text: str) -> list[int]:
        try:
            return list(prompt_ids(self.tokenizer, text, self.base.is_encoder_decoder))
        except TaskError:
            raise APIError(400, "prompt: it has no tokens.", param="prompt") from None

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation in the tokenizer's chat template, up to where the model is to answer."""
        if self.base.tokenizer.chat_template is None:
            raise APIError(
                400, "this model's tokenizer has no chat template: use /v1/completions.", param="messages"
            )
        text = "".join(m.text for m in messages)
        self.check_length(text, "messages")
        turns = [
            {"role": m.role, "content": m.text, **({} if m.name is None else {"name": m.name})}
            for m in messages
        ]
        return await self._run(lambda: self._encode_chat(turns), len(text))

    def _encode_chat(self, turns: list[dict[str, Any]]) -> list[int]:
        try:
            return conversation_ids(self.base, turns, tokenizer=self.tokenizer)
        except TaskError as error:
            why = client_message(error)
            why = why if why.startswith("messages") else f"messages: {why}"
            raise APIError(400, why[:500], param="messages") from None

    async def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words that may not be written, each at the beginning and after a space (vLLM's rule)."""
        if not words:
            return ()
        return await self._run(lambda: tuple(self._encode_bad_words(words)), sum(map(len, words)))

    def _encode_bad_words(self, words: Sequence[str]) -> Iterator[tuple[int, ...]]:
        for word in words:
            bare = self._encode_bare(word.lstrip())
            spaced = self._encode_bare(" " + word.lstrip())
            if not bare:
                raise APIError(400, "bad_words: one has no tokens.", param="bad_words")
            yield tuple(bare)
            # If it is as long with another first token, the word has a token of its own after a space. Otherwise the
            # space is a token before the same ones.
            if spaced[0] != bare[0] and len(spaced) == len(bare):
                yield tuple(spaced)

    async def encode_bare(self, text: str) -> list[int]:
        """The tokens of a text without special tokens around it."""
        self.check_length(text, "prompt")
        return await self._run(lambda: self._encode_bare(text), len(text))

    def _encode_bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    async def _run(self, do: Callable[[], T], length: int) -> T:
        thread = self._short if length < LONG else self._long
        return await asyncio.get_running_loop().run_in_executor(thread, do)

    def check_length(self, text: str, param: str) -> None:
        """Refuses a text that must have too many tokens, without tokenizing it: a word of two million letters would
        take seconds."""
        longest, most_letters = self.longest_token
        fewest = -(-len(text) // longest)
        if len(text) > self.limit:
            fewest = max(fewest, -(-_count_alphanumeric(text) // most_letters))
        if fewest > self.limit:
            raise context_length_exceeded(
                f"{len(text)} characters, which are at least {fewest} tokens", self.limit, param=param
            )

    @cached_property
    def longest_token(self) -> tuple[int, int]:
        """The most characters, and the most ASCII letters and digits, that one token can stand for."""
        tokens = [str(token) for token in self.base.tokenizer.get_vocab()]
        return max(map(len, tokens), default=1) or 1, max(map(_count_alphanumeric, tokens), default=1) or 1

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuses tokens that the model lacks."""
        if (largest := max(tokens)) >= self.vocabulary:
            raise APIError(
                400, f"{param}: there is no token {largest}; the model has {self.vocabulary}.", param=param
            )


def context_length_exceeded(what: str, limit: int, *, param: str) -> APIError:
    """The error for a prompt that doesn't fit, in the words that clients look for."""
    message = f"This model's maximum context length is {limit} tokens. However, your request has {what}."
    return APIError(400, message, param=param, code="context_length_exceeded")


def _count_alphanumeric(text: str) -> int:
    """How many ASCII letters and digits it has. Byte-level tokens show all other characters as different ones."""
    return len(text) - len(text.encode("ascii", "replace").translate(None, _ALPHANUMERIC))


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
