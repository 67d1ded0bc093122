"""What a router keeps of each sequence from pass to pass: one more layer of the key-value cache.

So it follows the sequences wherever transformers takes them: beams that change places, rows that are repeated or
selected, drafts that are cropped, caches that are copied.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache

from phatgoose.errors import RoutingError
from phatgoose.models.context.runs import Past, cache_of
from phatgoose.routers.context import PassMemory

DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)
"""A layer of a cache that holds no keys and values. transformers has it from 5.23; vLLM is used with older ones."""
KEPT = 256
"""States that are kept of the last tokens. A cache may be cropped by as many."""
ADVICE = "Begin without a cache, or fill it while this router is attached."


class _Kept(NamedTuple):
    """What a pass added."""

    states: Tensor
    """[rows, T, …], of its last T tokens."""
    rows: Tensor | None
    """int64 [n]: the rows of these that were taken before the next pass. None: all."""


class MemoryLayer(DummyLayer or object):  # type: ignore[misc]
    """A layer of a cache that holds a router's states after each of the cache's last tokens, KEPT of them or more.

    A state may be as long as a pool is large, so what is kept isn't copied for every token and beam. Tensors are
    replaced and never written into, so copies of the layer may share them.
    """

    def __init__(self, owner: object) -> None:
        super().__init__()
        self.owner, self.tokens = owner, 0
        self.kept: list[_Kept] = []

    def __copy__(self) -> MemoryLayer:
        # The owner stays the same object, by which a router knows its own.
        copied = MemoryLayer(self.owner)
        copied.tokens, copied.kept = self.tokens, list(self.kept)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryLayer:
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        # The owner knows the model, which doesn't belong in a file of a cache. No router continues what it can't own.
        return {**vars(self), "owner": None}

    def extend(self, states: Tensor) -> None:
        """Adds the states of the tokens of a pass, [rows, T, …]."""
        self.tokens += states.shape[1]
        if states.shape[1] > KEPT:
            states = states[:, -KEPT:].clone()  # a view would keep the whole pass's in memory
        if states.shape[1]:
            self.kept.append(_Kept(states, None))
        spare = sum(one.states.shape[1] for one in self.kept) - KEPT
        while self.kept and spare >= self.kept[0].states.shape[1]:
            spare -= self.kept.pop(0).states.shape[1]

    def last(self) -> Tensor:
        """[rows, …]: the states after the last token."""
        if not self.kept:
            raise RoutingError(
                f"the cache was cropped by more than {KEPT} tokens, for which nothing is kept of what the router has "
                f"read. {ADVICE}"
            )
        states, rows = self.kept[-1]
        return states[:, -1] if rows is None else states[:, -1][rows.to(states.device)]

    def reset(self) -> None:
        self.tokens, self.kept = 0, []

    def crop(self, tokens_to_remove: int) -> None:
        rest = abs(tokens_to_remove)
        self.tokens -= rest if self.kept else 0
        while rest and self.kept:
            states, rows = self.kept.pop()
            left = max(0, states.shape[1] - rest)
            rest -= states.shape[1] - left
            if left:
                self.kept.append(_Kept(states[:, :left], rows))
            elif rows is not None:
                self._take(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kept:
            states, rows = self.kept[-1]
            self._take(torch.arange(len(states if rows is None else rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def _take(self, rows: Tensor) -> None:
        """Goes on with these rows: int64 [n], or bool."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        if self.kept:
            states, before = self.kept[-1]
            self.kept[-1] = _Kept(states, rows if before is None else before[rows.to(before.device)])


def recalled(past: Past, rows: int, owner: object) -> Tensor | None:
    """What `owner` left after the tokens that a pass of so many rows continues, [rows, …]; None if there are none.

    Raises:
        RoutingError: the cache holds tokens that the router hasn't read.
    """
    if past.problem is not None:
        raise RoutingError(past.problem)
    if not past.tokens:
        return None
    layer = _layer_of(past.cache)
    if layer is None or layer.owner is not owner or layer.tokens != past.tokens:
        raise RoutingError(
            f"this pass continues a {type(past.cache).__name__} of {past.tokens} tokens, which the router that is "
            f"attached hasn't all read. {ADVICE}"
        )
    found = layer.last()
    if len(found) != rows:
        raise RoutingError(f"a cache of {len(found)} sequences can't be continued in {rows} rows.")
    return found


def keep(memory: PassMemory, past: Past, output: Any, owner: object) -> None:
    """A pass has ended: what it leaves goes into the cache that it filled, if there is one."""
    cache = _own_part(past.cache if past.cache is not None else cache_of(output))
    if memory.after is None or not isinstance(cache, Cache):
        return
    if DummyLayer is None:
        raise RoutingError(
            "a router that keeps what it has read beside the cache needs transformers 5.23 or newer: update it, or "
            "pass use_cache=False."
        )
    layer = _layer_of(cache)
    if layer is None or layer.owner is not owner or not past.tokens:
        cache.layers = [one for one in cache.layers if one is not layer]
        layer = MemoryLayer(owner)
        cache.layers.append(layer)
    layer.extend(memory.after.detach())


def _own_part(cache: Any) -> Any:
    """The part of a cache that holds what a decoder has read itself, if there is another for cross-attention."""
    return getattr(cache, "self_attention_cache", cache)


def _layer_of(cache: Any) -> MemoryLayer | None:
    layers = getattr(_own_part(cache), "layers", None) or ()
    return next((layer for layer in layers if isinstance(layer, MemoryLayer)), None)
