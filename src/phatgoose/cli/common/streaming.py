"""Encode a prompt, and print its answer to standard output as it is generated (imports torch)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from phatgoose.cli.common.options import GenerationOptions
from phatgoose.cli.measure import show
from phatgoose.experts.pool import Pool
from phatgoose.models.base.base import Base, context_length
from phatgoose.models.text.encoding import encode_chat, encode_prompt
from phatgoose.models.text.generate import answer_settings, max_answer_tokens, run_generate
from phatgoose.workflows.prompt_forms import fitting_form, read_of_turn


def encode(base: Base, pool: Pool | None, text: str, *, chat: bool) -> tuple[Tensor, list[str]]:
    """(token ids [1, T], the texts that routers read instead of them). Notes a form of prompt that experts don't
    know."""
    _, remark = fitting_form(pool, "chat" if chat else "raw", base.tokenizer.chat_template is not None)
    if remark:
        show.note(f"note: {remark}")
    if not chat:
        return encode_prompt(base, text), []
    return encode_chat(base, [{"role": "user", "content": text}]), read_of_turn(pool, text)


class Printer(TextStreamer):
    """Prints text as it comes, without the space between the prompt and its answer, and keeps it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.text:
            text = text.lstrip()
        self.text += text
        super().on_finalized_text(text, stream_end)


def room_for(base: Base, ids: Tensor, max_new_tokens: int) -> int:
    """How many tokens may follow ids [1, T]: `max_new_tokens`, or what fits, which is then noted."""
    room = max_answer_tokens(base, ids.shape[1], max_new_tokens)
    if room < max_new_tokens:
        context = context_length(base.model)
        show.note(f"note: at most {room} tokens fit into the model's context of {context}")
    return room


def stream(base: Base, ids: Tensor, options: GenerationOptions) -> str:
    """Generates after ids [1, T], printing as it goes; greedily at temperature 0. Returns the text."""
    room = room_for(base, ids, options.max_new_tokens)
    own = answer_settings(base, room, options.temperature)
    if options.temperature > 0:
        torch.manual_seed(options.seed)
    printer = Printer(base.tokenizer)
    run_generate(base.model, ids.tolist(), own, streamer=printer)
    return printer.text
