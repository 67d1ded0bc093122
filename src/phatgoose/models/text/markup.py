"""What a tokenizer puts around text: special tokens, and its chat template's words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from phatgoose.routers.markup import Markup

_MARK = "\ue000"
"""Stands for what is said, in conversations that are rendered to see what is put around it."""
_CONVERSATIONS = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
)


def markup_of(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """The special tokens of a tokenizer, and what its default chat template, if it has one, puts behind them.

    That is the names of roles, line breaks, and a system prompt that the template adds of itself. Conversations that
    the template refuses (some know no system turn) teach nothing.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    pieces = [piece for text in _between(tokenizer) for piece in _split(tokenizer, text, special)]
    return Markup(special, pieces)


def _between(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts that the template puts before, between and behind what is said."""
    if tokenizer.chat_template is None:
        return
    apply: Any = tokenizer.apply_chat_template
    for roles in _CONVERSATIONS:
        messages = [{"role": role, "content": _MARK} for role in roles]
        try:
            rendered = str(apply(messages, add_generation_prompt=True, tokenize=False))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            continue
        yield from rendered.split(_MARK)


def _split(tokenizer: PreTrainedTokenizerBase, text: str, special: set[int]) -> Iterator[list[int]]:
    """A text's tokens in pieces that begin with a special token each; what is before the first is left out."""
    piece: list[int] = []
    for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
        if token in special:
            if piece:
                yield piece
            piece = [token]
        elif piece:
            piece.append(token)
    if piece:
        yield piece
