"""Prompt → text on standard output, token by token. Imports torch: import it lazily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from phatgoose.cli import show
from phatgoose.errors import PhatgooseError
from phatgoose.evaluation.continuations import context_length
from phatgoose.evaluation.generate import end_tokens
from phatgoose.models.base import Base
from phatgoose.tasks.batch import encode_pair, pad_id

_UNLIMITED = 2**31


class Printer(TextStreamer):
    """Prints as it comes, without the space that stands between a prompt and its answer, and keeps the text."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.text:
            text = text.lstrip()
        self.text += text
        super().on_finalized_text(text, stream_end)


def encode_prompt(base: Base, prompt: str) -> Tensor:
    """`prompt` as the trainings and the evaluation encode it: int64 [1, T].

    Raises:
        TaskError: it has no tokens.
    """
    pair = encode_pair(
        base.tokenizer, prompt, "a", is_encoder_decoder=base.is_encoder_decoder, max_length=_UNLIMITED
    )
    return torch.tensor([pair.prompt_ids])


def encode_chat(base: Base, messages: Sequence[dict[str, str]]) -> Tensor:
    """A conversation through the tokenizer's chat template, up to where the model is to answer: int64 [1, T].

    Raises:
        PhatgooseError: the tokenizer has no chat template.
    """
    if base.tokenizer.chat_template is None:
        raise PhatgooseError(f"the tokenizer of {base.spec} has no chat template: use --raw.")
    found = base.tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = found["input_ids"]  # type: ignore[index, call-overload]
    assert isinstance(ids, Tensor)
    return ids


def room_for(base: Base, ids: Tensor, max_new_tokens: int) -> int:
    """How many tokens may follow ids [1, T]: `max_new_tokens`, or what fits, which is then noted.

    Raises:
        PhatgooseError: the prompt leaves no room in the model's context.
    """
    context = None if base.is_encoder_decoder else context_length(base.model)
    room = max_new_tokens if context is None else context - ids.shape[1]
    if room < 1:
        raise PhatgooseError(
            f"the prompt has {ids.shape[1]} tokens and the model's context {context}: nothing can be added. Shorten it."
        )
    if room < max_new_tokens:
        show.note(f"note: at most {room} tokens fit into the model's context of {context}")
    return min(room, max_new_tokens)


def stream(base: Base, ids: Tensor, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Generates after ids [1, T], printing as it goes; greedily at temperature 0. Returns the text.

    Raises:
        PhatgooseError: the prompt leaves no room in the model's context.
    """
    room = room_for(base, ids, max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    printer = Printer(base.tokenizer)
    ids = ids.to(base.device)
    with torch.no_grad():
        base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=printer,
            max_new_tokens=room,
            eos_token_id=sorted(end_tokens(base.model, base.tokenizer.eos_token_id)),
            pad_token_id=pad_id(base.tokenizer),
            **sampling,
        )  # type: ignore[operator]
    return printer.text
