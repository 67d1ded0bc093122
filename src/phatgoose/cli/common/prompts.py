"""A prompt from the command line: read, checked, and encoded as the base takes it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from phatgoose.cli.measure import show

if TYPE_CHECKING:
    from torch import Tensor

    from phatgoose.experts.pool import Pool
    from phatgoose.models.base.base import Base


def read_prompt(prompt: str) -> str:
    """The prompt; "-" reads it from standard input.

    Raises:
        BadParameter: it is empty.
    """
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise typer.BadParameter("it is empty.", param_hint="PROMPT")
    return text


def encode(base: Base, pool: Pool | None, text: str, *, chat: bool) -> tuple[Tensor, list[str]]:
    """(token ids [1, T], the texts that routers read instead of them). Notes a form of prompt that experts don't
    know."""
    from phatgoose.models.text.encoding import encode_chat, encode_prompt
    from phatgoose.workflows.prompt_forms import fitting_form, read_of_turn

    _, remark = fitting_form(pool, "chat" if chat else "raw", base.tokenizer.chat_template is not None)
    if remark:
        show.note(f"note: {remark}")
    if not chat:
        return encode_prompt(base, text), []
    return encode_chat(base, [{"role": "user", "content": text}]), read_of_turn(pool, text)
