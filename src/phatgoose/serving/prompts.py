"""Tokenize requests in threads of their own, so that a long prompt doesn't hold up others."""

from __future__ import annotations

import asyncio
import copy
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from phatgoose.errors import TaskError
from phatgoose.models.base.base import Base
from phatgoose.models.text.conversation import conversation_ids
from phatgoose.models.text.encoding import prompt_ids
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import Message
from phatgoose.serving.errors import client_message

T = TypeVar("T")
_ALPHANUMERIC = (string.ascii_letters + string.digits).encode()
LONG = 8192
"""Texts of this many characters or more wait for other long ones."""


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
        """The tokens of a conversation in the tokenizer's chat template, up to where the model is to answer.

        Raises:
            APIError: there is no template, it refuses the conversation, or the conversation is too long.
        """
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
