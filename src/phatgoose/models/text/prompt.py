"""A prompt or a conversation → tokens, and how many may follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.models.base.base import Base
from phatgoose.models.base.limits import context_length
from phatgoose.models.text.batch import prompt_ids
from phatgoose.models.text.conversation import conversation_ids


def encode_prompt(base: Base, prompt: str) -> Tensor:
    """`prompt` as the trainings and the evaluation encode it: int64 [1, T].

    Raises:
        TaskError: it has no tokens.
    """
    return torch.tensor([prompt_ids(base.tokenizer, prompt, base.is_encoder_decoder)])


def encode_chat(base: Base, messages: Sequence[dict[str, str]]) -> Tensor:
    """A conversation as `conversation_ids` has it, up to where the model is to answer: int64 [1, T].

    Raises:
        PhatgooseError: the tokenizer has no chat template, or it refuses the conversation.
    """
    if base.tokenizer.chat_template is None:
        raise PhatgooseError(f"the tokenizer of {base.spec} has no chat template: use --raw.")
    return torch.tensor([conversation_ids(base, messages)])


def room_behind(base: Base, tokens: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt of `tokens`: `max_new_tokens`, or what fits into the model's context.

    Raises:
        PhatgooseError: the prompt leaves no room.
    """
    context = None if base.is_encoder_decoder else context_length(base.model)
    room = max_new_tokens if context is None else context - tokens
    if room < 1:
        raise PhatgooseError(
            f"the prompt has {tokens} tokens and the model's context {context}: nothing can be added. Shorten it."
        )
    return min(room, max_new_tokens)
