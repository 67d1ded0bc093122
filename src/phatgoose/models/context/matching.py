"""Which of a pass's tokens a module sees, by the shape of its input.

What can't be told is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phatgoose.routers.context import unmatched

_UNMATCHABLE = {
    "fsmt": ("encoder", "decoder"),
    "led": ("encoder",),
    "longformer": ("decoder",),
    "longt5": ("encoder",),
    "pegasus_x": ("encoder",),
    "xlnet": ("decoder",),
}
"""Architectures whose blocks see rows and columns exchanged, or tokens of their own (global ones) too. In some
batches these have the same shape as the tokens in order, so a shape says nothing."""


def unmatchable_stacks(model: PreTrainedModel) -> dict[str, str]:
    """The stacks whose modules can't be matched to tokens by shape, and why."""
    kind = model.config.model_type
    if kind == "longt5" and model.config.encoder_attention_type == "local":
        return {}
    why = (
        f"the modules of {kind}'s {{}} see tokens in another order, or more than the text's, so their tokens can't be "
        "told. Traces and Random need them; take a router that reads activations alone, such as PHATGOOSE or Single."
    )
    return {name: why.format(name) for name in _UNMATCHABLE.get(kind, ())}


def is_in_expert_list(model: nn.Module, path: str) -> bool:
    """Whether the path leads through a list inside a block: a mixture's experts, for which its router picks tokens."""
    at: Any = model
    lists = 0
    for part in path.split(".")[:-1]:
        if (at := getattr(at, part, None)) is None:  # transformers 4's name of a mixture's router
            break
        lists += isinstance(at, nn.ModuleList | nn.ModuleDict)
    return lists > 1


@dataclass(frozen=True)
class Match:
    """The tokens that a module sees: [rows, length], all of each sequence, or those at `kept`.

    problem: why that can't be known. The rows may still be those of the pass, with `length` inputs each (by_row), and
    all but the first `again` inputs of a row may be its new tokens.
    """

    rows: int
    length: int
    kept: Tensor | None = None
    problem: str | None = None
    by_row: bool = True
    again: int = 0


def match(
    lead: Sequence[int], batch: int, length: int, *, repeats: bool, dispatched: bool, past: int = 0
) -> Match:
    """What a module inside a stack sees, if the stack runs over [batch, length] tokens and the module's input is
    [*lead, d].

    repeats: the input may have each sequence several times (beams read what was encoded once). dispatched: the module
    may be given tokens that were picked for it, in any order. past: how many tokens a cache holds before these.
    """
    # DeepSeek's kv_b_proj has a dimension of heads, of size 1.
    if len(lead) > 2:
        lead = (lead[0], *(n for n in lead[1:] if n != 1))
        lead = (*lead, 1) if len(lead) == 1 else lead
    if (
        len(lead) == 2
        and lead[1] == length
        and (lead[0] == batch or (repeats and batch and lead[0] % batch == 0))
    ):
        return Match(lead[0], length)
    # One row after the other. Picked tokens may have the same number, but not the same order.
    flat = len(lead) == 1 or (len(lead) == 2 and lead[0] == 1)
    if flat and prod(lead) == batch * length and (not dispatched or batch * length == 1):
        return Match(batch, length)
    if past and tuple(lead) == (batch, past + length):
        why = f"it sees the {past} tokens of the cache again, which aren't known one by one: use_cache=False."
        return Match(batch, past + length, None, why, again=past)
    by_row = (len(lead) > 1 and lead[0] == batch) or batch == 1
    rows = batch if by_row else 1
    what = unmatched(lead, batch, length)
    if dispatched:
        what += ": it is one of several experts, and its layer picks the tokens"
    return Match(rows, prod(lead) // max(rows, 1), None, f"{what}.", by_row)


def match_head(lead: Sequence[int], batch: int, length: int, asked: Any) -> Match:
    """What a module after the stack sees, if the head model was called with logits_to_keep=`asked`."""
    whole = match(lead, batch, length, repeats=False, dispatched=False)
    if isinstance(asked, Tensor) and asked.ndim == 1 and lead == (batch, len(asked)):
        return Match(batch, len(asked), asked.long() % length)
    if whole.problem is not None and isinstance(asked, int) and asked > 0 and lead == (batch, asked):
        return Match(batch, asked, torch.arange(length - asked, length))
    return whole


def is_repeated(one: Tensor, other: Tensor) -> bool:
    """Whether `one` is `other`, or consists of its rows, each repeated equally often (beams)."""
    if one is other:
        return True
    if one.shape[1:] != other.shape[1:] or len(one) % max(len(other), 1):
        return False
    return torch.equal(one.to(other.device), other.repeat_interleave(len(one) // len(other), dim=0))


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether they are one tensor, or views of one."""
    return one is other or (
        one.numel() == other.numel()
        and one.device == other.device
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )
