"""Requests → tokens, in a thread of its own, so that a long prompt doesn't keep others waiting."""

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
from phatgoose.serving.engine.job import told

T = TypeVar("T")
_LETTERS = (string.ascii_letters + string.digits).encode()


LONG = 8192
"""Characters from which on a text waits for other long ones."""


class Prompts:
    """Encodes as the trainings and the evaluation do.

    Long texts have a thread and a copy of the tokenizer of their own, so that short ones never wait for them.

    Args:
        most: how many tokens a prompt may have; what can't be so few by its length alone is refused unread.
    """

    def __init__(self, base: Base, most: int = 2**31):
        self.base, self.most = base, most
        embedding: Any = base.model.get_input_embeddings()
        self.vocabulary = int(embedding.weight.shape[0])
        self._local = threading.local()
        self._short = ThreadPoolExecutor(1, "phatgoose-tokenizer")
        self._long = ThreadPoolExecutor(1, "phatgoose-tokenizer-long", initializer=self._copy_tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The one that this thread may use."""
        return getattr(self._local, "tokenizer", self.base.tokenizer)

    def _copy_tokenizer(self) -> None:
        self._local.tokenizer = copy.deepcopy(self.base.tokenizer)

    async def of_text(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt given as text or as tokens.

        Raises:
            APIError: it has no tokens, or tokens that the model doesn't have.
        """
        if not isinstance(prompt, str):
            self.check(prompt, "prompt")
            return list(prompt)
        self.check_length(prompt, "prompt")
        return await self._run(lambda: self._encode(prompt), len(prompt))

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation through the tokenizer's chat template, up to where the model is to answer.

        Raises:
            APIError: there is no template, or it refuses the conversation.
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
        return await self._run(lambda: self._render(turns), len(text))

    async def words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words that aren't to be written, each as it is at the beginning and behind a space: vLLM's rule.

        Raises:
            APIError: a word has no tokens.
        """
        if not words:
            return ()
        return await self._run(lambda: tuple(self._words(words)), sum(map(len, words)))

    def _words(self, words: Sequence[str]) -> Iterator[tuple[int, ...]]:
        for word in words:
            bare = self._bare(word.lstrip())
            spaced = self._bare(" " + word.lstrip())
            if not bare:
                raise APIError(400, "bad_words: one has no tokens.", param="bad_words")
            yield tuple(bare)
            # As long, with another first token: a token for the word behind a space. Else the space is a token before the same ones.
            if spaced[0] != bare[0] and len(spaced) == len(bare):
                yield tuple(spaced)

    async def bare(self, text: str) -> list[int]:
        """The tokens of a text alone, without special ones around it."""
        self.check_length(text, "prompt")
        return await self._run(lambda: self._bare(text), len(text))

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def check_length(self, text: str, param: str) -> None:
        """Refuses a text that must have too many tokens, without making them: of a word of two million letters that takes seconds."""
        longest, letters = self._longest
        least = max(-(-len(text) // longest), -(-_letters(text) // letters) if len(text) > self.most else 0)
        if least > self.most:
            raise too_long(
                f"{len(text)} characters, which are at least {least} tokens", self.most, param=param
            )

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """The most characters, and the most ASCII letters and digits, that one token can stand for."""
        tokens = [str(token) for token in self.base.tokenizer.get_vocab()]
        return max(map(len, tokens), default=1) or 1, max(map(_letters, tokens), default=1) or 1

    def check(self, tokens: Sequence[int], param: str) -> None:
        """Refuses tokens that the model doesn't have."""
        if (worst := max(tokens)) >= self.vocabulary:
            raise APIError(
                400, f"{param}: there is no token {worst}; the model has {self.vocabulary}.", param=param
            )

    def _encode(self, text: str) -> list[int]:
        try:
            return list(prompt_ids(self.tokenizer, text, self.base.is_encoder_decoder))
        except TaskError:
            raise APIError(400, "prompt: it has no tokens.", param="prompt") from None

    def _render(self, turns: list[dict[str, Any]]) -> list[int]:
        try:
            return conversation_ids(self.base, turns, tokenizer=self.tokenizer)
        except TaskError as error:
            why = told(error)
            why = why if why.startswith("messages") else f"messages: {why}"
            raise APIError(400, why[:500], param="messages") from None

    async def _run(self, do: Callable[[], T], length: int) -> T:
        thread = self._short if length < LONG else self._long
        return await asyncio.get_running_loop().run_in_executor(thread, do)


def too_long(what: str, most: int, *, param: str) -> APIError:
    """The refusal of a prompt that doesn't fit, in words that clients look for."""
    return APIError(
        400, f"This model's maximum context length is {most} tokens. However, your request has {what}.",
        param=param, code="context_length_exceeded",
    )  # fmt: skip


def _letters(text: str) -> int:
    """How many ASCII letters and digits it has: byte-level tokens show others as other characters."""
    return len(text) - len(text.encode("ascii", "replace").translate(None, _LETTERS))
