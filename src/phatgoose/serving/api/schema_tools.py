"""What requests may say that ask for no answer: text ↔ tokens, and changes of the experts."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from phatgoose.serving.api.parameters import REFUSED, Strict, Text, TokenList, refused, supported
from phatgoose.serving.api.schema import Message

_REFUSED = {
    name: REFUSED[name]
    for name in (
        "add_generation_prompt",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "tools",
    )
}
"""Parameters of vLLM's /tokenize that aren't honoured."""


class AddExpert(Strict):
    """An expert to add: a folder on the server's machine."""

    folder: Text = Field(min_length=1, max_length=4096)
    name: Text | None = Field(None, min_length=1, max_length=256)


class Tokenize(Strict):
    """What /tokenize takes: a text as /v1/completions reads it, or a conversation as /v1/chat/completions does."""

    model: Text | None = Field(None, max_length=256)
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return supported(data, _REFUSED, cls.model_fields)

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refused("prompt", "either a prompt or messages are to be tokenized")
        if self.messages is not None and self.add_special_tokens:
            raise refused(
                "add_special_tokens", "add_special_tokens isn't supported: the chat template has them"
            )
        return self


class Detokenize(Strict):
    """What /detokenize takes."""

    model: Text | None = Field(None, max_length=256)
    tokens: TokenList
