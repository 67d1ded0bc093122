"""Prompts → next-token logits and key-value caches, which many answers continue from.

Decoder-only prompts are padded on the left, and logits are asked for at the last position only. In an
encoder–decoder the encoder reads the prompt (padded on the right); what is kept is its output, and the
decoder's cache of the start token with the cross-attention's keys and values.

A task's instructions, its examples, or the passage of several questions are the same tokens in many of its prompts.
Such prefixes are computed once (`build_prefix_tree`) and continued by each of the prompts: keys and values don't
depend on what follows, since attention is causal and routers choose token by token. `can_prefill_in_parts` knows
where that isn't so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from phatgoose.errors import BaseModelError, EvaluationError
from phatgoose.evaluation.batching import FORWARD_COST, split_into_batches
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import decoder_start, device_of
from phatgoose.models.text.batch import pad_rows
from phatgoose.models.text.capabilities import (
    accepts_argument,
    check_scorable,
    has_cache_layers,
    is_plain_cache,
    max_mixed_length,
    may_attend_ahead,
    supports_shared_cache,
)
from phatgoose.models.text.encoding import UNLIMITED

MAX_DEPTH = 4
"""Most prefixes within prefixes, whose caches live at the same time. The tasks of BIG-bench and T0 have no use
for more."""
MAX_COMPARED = 1024
"""Most prompts that are compared with each other, so that thousands of nested ones cost no more than others."""
_CHECKED = "_phatgoose_rows_checked"


@dataclass(frozen=True)
class Prefill:
    """Prompts that were run. Logits and cache are None where no cache can be shared: then each answer is run
    with its prompt."""

    model: PreTrainedModel
    pad: int
    config: EvaluationConfig
    prompts: tuple[tuple[int, ...], ...]
    mask: Tensor
    """[rows, width]: 1 at the prompts' tokens."""
    logits: Tensor | None = None
    """[rows, vocabulary]: the next token's, in the model's dtype."""
    cache: Any = None
    encoder_output: Tensor | None = None
    parent_positions: int = 0
    """Positions (rows × width) of the caches that this one continues, which live as long as it."""

    @property
    def free_positions(self) -> int:
        """Positions that may still be cached while this Prefill lives."""
        return self.config.cache_tokens - self.parent_positions - self.mask.numel()

    @property
    def max_cached_length(self) -> int:
        """The length of prompt and answer up to which continuing from the cache computes what running both
        together does."""
        if self.cache is None:
            return 0
        return UNLIMITED if self.encoder_output is not None else max_mixed_length(self.model)


@dataclass(eq=False)
class PrefixNode:
    """The first `length` tokens that some prompts share."""

    length: int
    rows: list[int] = field(default_factory=list)
    """Prompts that continue from here by themselves."""
    children: list[PrefixNode] = field(default_factory=list)
    """Longer prefixes, of other prompts that begin with this one."""

    def any_row(self) -> int:
        """One of the prompts that begin with this prefix."""
        return self.rows[0] if self.rows else self.children[0].any_row()


def prefill_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int, config: EvaluationConfig
) -> Prefill:
    """Runs `prompts` (none empty) in one forward, and keeps their cache if answers may continue from it."""
    if may_attend_ahead(model):
        check_scorable_once(model)
    whole, seq2seq = tuple(map(tuple, prompts)), bool(model.config.is_encoder_decoder)
    ids, mask = (tensor.to(device_of(model)) for tensor in pad_rows(prompts, pad, left=not seq2seq))
    if supports_shared_cache(model) and (seq2seq or ids.shape[1] <= max_mixed_length(model)):
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        if seq2seq:
            start = torch.full((len(prompts), 1), decoder_start(model), device=ids.device)
            inputs["decoder_input_ids"] = start
        elif accepts_argument(model, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if accepts_argument(model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        out = model(**inputs)
        cache = getattr(out, "past_key_values", None)
        if is_plain_cache(cache):
            encoder_output = out.encoder_last_hidden_state if seq2seq else None
            return Prefill(model, pad, config, whole, mask, out.logits[:, -1], cache, encoder_output)
    return Prefill(model, pad, config, whole, mask)


def prefill_batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int, config: EvaluationConfig
) -> Iterator[tuple[list[int], Prefill]]:
    """Runs `prompts` (none empty) in batches, each prompt once: (the numbers of some prompts, their Prefill).

    Let go of a Prefill before asking for the next. Then caches hold at most `config.cache_tokens` in all, or
    one row for each depth of the prefix tree.
    """
    whole = tuple(map(tuple, prompts))
    if can_prefill_in_parts(model):
        root = build_prefix_tree(whole, FORWARD_COST)
    else:
        root = PrefixNode(0, list(range(len(whole))))
    nothing = Prefill(model, pad, config, ((),), torch.ones(1, 0))
    return _prefill_under(nothing, [(0, root)], whole)


def _prefill_under(
    parent: Prefill, nodes: Sequence[tuple[int, PrefixNode]], prompts: Sequence[tuple[int, ...]]
) -> Iterator[tuple[list[int], Prefill]]:
    """All prompts under `nodes`: prefixes, each with the row of `parent` that holds it."""
    config = parent.config
    limits = [(0, config.tokens_for(device_of(parent.model)))]
    if parent.cache is not None:
        # Half of what is free is for this level; the rest is for the levels below it and for answers.
        limits.append((parent.mask.shape[1], parent.free_positions // 2))

    def batches(jobs: Sequence[tuple[int, tuple[int, ...]]]) -> list[list[int]]:
        left = [len(tokens) - len(parent.prompts[owner]) for owner, tokens in jobs]
        return split_into_batches(left, limits, config.batch_rows)

    def run(jobs: Sequence[tuple[int, tuple[int, ...]]]) -> Prefill:
        owners, tokens = [owner for owner, _ in jobs], [tokens for _, tokens in jobs]
        if parent.cache is None:
            return prefill_prompts(parent.model, tokens, parent.pad, config)
        return _continue_prefill(parent, owners, tokens)

    # No name here holds a Prefill while the next is computed, or two caches would live at a time.
    rows = [(owner, row) for owner, node in nodes for row in node.rows]
    jobs = [(owner, prompts[row]) for owner, row in rows]
    for batch in batches(jobs):
        yield [rows[n][1] for n in batch], run([jobs[n] for n in batch])
    children = [(owner, child) for owner, node in nodes for child in node.children]
    jobs = [(owner, prompts[child.any_row()][: child.length]) for owner, child in children]
    for batch in batches(jobs):
        under = [(n, children[c][1]) for n, c in enumerate(batch)]
        yield from _prefill_under(run([jobs[n] for n in batch]), under, prompts)


def _continue_prefill(parent: Prefill, owners: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> Prefill:
    """Runs what prompt i has beyond row `owners[i]` of `parent`, its prefix. The result is as if the prompt
    had been run in one."""
    model = parent.model
    rests = [p[len(parent.prompts[owner]) :] for owner, p in zip(owners, prompts, strict=True)]
    ids, new = (tensor.to(device_of(model)) for tensor in pad_rows(rests, parent.pad, left=True))
    chosen = torch.tensor(owners)
    mask = torch.cat([parent.mask[chosen.to(parent.mask.device)], new], dim=1)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
        past_key_values=select_cache_rows(parent.cache, chosen),
        use_cache=True,
        logits_to_keep=1,
    )
    cache, mask = _move_padding_left(out.past_key_values, mask)
    return replace(
        parent,
        prompts=tuple(prompts),
        mask=mask,
        logits=out.logits[:, -1],
        cache=cache,
        parent_positions=parent.parent_positions + parent.mask.numel(),
    )


def _move_padding_left(cache: Any, mask: Tensor) -> tuple[Any, Tensor]:
    """A cache and its mask [rows, positions] with each row's padding at the left, also that between prefix and rest."""
    width = int(mask.sum(-1).max())
    if width == mask.shape[1] and bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return cache, mask
    # A stable sort by the mask keeps the order of the tokens, and cuts columns that are padding in every row.
    order = mask.argsort(dim=-1, stable=True)[:, -width:]
    for layer in cache.layers:
        columns = order.to(layer.keys.device)[:, None, :, None]
        layer.keys, layer.values = (
            x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (layer.keys, layer.values)
        )
    return cache, mask.gather(1, order)


def can_prefill_in_parts(model: PreTrainedModel) -> bool:
    """True if a prompt may be run in two forwards, its prefix shared with others, and together with tokens that it
    doesn't see.

    False for an encoder–decoder, whose encoder looks ahead; where positions or windows are counted by places
    in the cache, not by what they hold; where the rotation of early tokens depends on how many follow; with
    caches that keep less than every position; for a router that looks at more than one token; and while a
    trace counts tokens, which would miss the shared ones.
    """
    config = model.config
    if config.is_encoder_decoder or getattr(config, "alibi", False) or config.model_type == "gpt_neo":
        return False
    if not (accepts_argument(model, "position_ids") and accepts_argument(model, "logits_to_keep")):
        return False
    if max_mixed_length(model) < UNLIMITED:
        return False
    routing = routing_of(model)
    if routing is not None and (routing.recorder is not None or not routing.router.by_token):
        return False
    return has_cache_layers(model, (DynamicLayer,))


def select_cache_rows(cache: Any, rows: Tensor) -> Any:
    """A cache that holds rows `rows` (int64, on the CPU: that indexes layers on any device) of `cache`, which
    stays as it is."""
    if isinstance(cache, EncoderDecoderCache):
        parts = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(*(select_cache_rows(part, rows) for part in parts))
    # These layers replace their tensors and never write into them, so copies of the layers may share them.
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    new.batch_select_indices(rows)
    return new


def check_scorable_once(model: PreTrainedModel) -> None:
    """Runs `check_scorable` on the base alone, without routing and trace, the first time it is called for a model."""
    if model.__dict__.get(_CHECKED):
        return
    routing = routing_of(model)
    recorder = None if routing is None else routing.recorder
    if routing is not None:
        routing.detach()
    try:
        check_scorable(model)
    except BaseModelError as cause:
        raise EvaluationError(str(cause)) from cause
    finally:
        if routing is not None:
            routing.attach()
            routing.record(recorder)
    model.__dict__[_CHECKED] = True


def build_prefix_tree(prompts: Sequence[Sequence[int]], min_saved: int) -> PrefixNode:
    """The tree of prefixes under an empty one. Every prompt is in exactly one node.

    A prefix is shorter than each of its prompts, so that all have a token of their own to read. Reading it
    once must save more than `min_saved` tokens compared with its parent: (prompts − 1) · (tokens beyond the parent).
    """
    # Sorted, so that prompts with a common prefix are neighbours; common[i] is what neighbours i and i + 1 share.
    order = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    common = [_common_length(prompts[a], prompts[b]) for a, b in pairwise(order)]
    root = PrefixNode(0)
    todo = [(low, min(low + MAX_COMPARED, len(order)), root, 0) for low in range(0, len(order), MAX_COMPARED)]
    while todo:
        low, high, parent, depth = todo.pop()
        if high - low == 1 or depth == MAX_DEPTH:
            parent.rows += order[low:high]
            continue
        shared = min(common[low : high - 1])
        length = min(shared, len(prompts[order[low]]) - 1)  # the shortest prompt of these is the first
        if (high - low - 1) * (length - parent.length) > min_saved:
            parent.children.append(PrefixNode(length))
            parent, depth = parent.children[-1], depth + 1
        # Split where neighbours share no more than all of them do, and look at each part by itself.
        ends = [low, *(n + 1 for n in range(low, high - 1) if common[n] == shared), high]
        todo += [(start, end, parent, depth) for start, end in pairwise(ends)]
    return root


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return min(len(a), len(b))
