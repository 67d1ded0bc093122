"""Requests → tokens, in a thread of its own, so that a long prompt doesn't keep others waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from phatgoose.errors import TaskError
from phatgoose.models.base import Base
from phatgoose.serving.refusals import Refusal
from phatgoose.serving.schema import Message
from phatgoose.tasks.batch import prompt_ids

T = TypeVar("T")


class Prompts:
    """Encodes as the trainings and the evaluation do. A tokenizer is used by one thread at a time."""

    def __init__(self, base: Base):
        self.base = base
        embedding: Any = base.model.get_input_embeddings()
        self.vocabulary = int(embedding.weight.shape[0])
        self._thread = ThreadPoolExecutor(1, "phatgoose-tokenizer")

    async def of_text(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt given as text or as tokens.

        Raises:
            Refusal: it has no tokens, or tokens that the model doesn't have.
        """
        if not isinstance(prompt, str):
            self.check(prompt, "prompt")
            return list(prompt)
        return await self._run(lambda: self._encode(prompt))

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation through the tokenizer's chat template, up to where the model is to answer.

        Raises:
            Refusal: there is no template, or it refuses the conversation.
        """
        if self.base.tokenizer.chat_template is None:
            raise Refusal(
                400, f"the tokenizer of {self.base.spec} has no chat template: use /v1/completions."
            )
        turns = [
            {"role": m.role, "content": m.text, **({} if m.name is None else {"name": m.name})}
            for m in messages
        ]
        return await self._run(lambda: self._render(turns))

    def check(self, tokens: Sequence[int], param: str) -> None:
        """Refuses tokens that the model doesn't have."""
        if (worst := max(tokens)) >= self.vocabulary:
            raise Refusal(
                400, f"{param}: there is no token {worst}; the model has {self.vocabulary}.", param=param
            )

    def _encode(self, text: str) -> list[int]:
        try:
            return list(prompt_ids(self.base.tokenizer, text, self.base.is_encoder_decoder))
        except TaskError:
            raise Refusal(400, "prompt: it has no tokens.", param="prompt") from None

    def _render(self, turns: list[dict[str, Any]]) -> list[int]:
        apply: Any = self.base.tokenizer.apply_chat_template
        try:
            found = apply(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        except (TemplateError, TypeError, ValueError) as error:
            why = f"messages: the model's chat template refuses them ({type(error).__name__}: {error})."
            raise Refusal(400, why[:500], param="messages") from None
        if not found:
            raise Refusal(
                400, "messages: the model's chat template makes no tokens of them.", param="messages"
            )
        return list(found)

    async def _run(self, do: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, do)
