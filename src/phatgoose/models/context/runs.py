"""`Run`: one pass of an encoder or decoder, what it continues, and which tokens it runs over.

A pass continues a key-value cache or a state. Most say how many tokens they hold; `Caches` counts those that don't.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from phatgoose.errors import RoutingError
from phatgoose.ops.forward_state import ForwardState
from phatgoose.routers.context import PassMemory, Prompt, Sequences, Texts, positions_from

NAMES = ("past_key_values", "cache_params", "state")
"""How transformers' models name the argument (and the output) that a later pass continues."""

_UNKNOWN = ("cache", "mems", "past_buckets_states")
"""Caches of XLM, XLNet and Reformer: with these a model runs over other tokens than it is given."""

Written = tuple[tuple[int, ...] | str, ...]
"""What stands behind each row's prompt, or why that isn't known."""


class ForgottenByCopies(WeakIdKeyDictionary):
    """Objects → what is known of them, forgotten with them. Copies and pickles start empty: a copy of a model shares no
    caches or states with it."""

    def __reduce__(self) -> Any:
        return type(self), ()

    def __deepcopy__(self, memo: Any) -> ForgottenByCopies:
        return type(self)()


@dataclass(frozen=True, eq=False)
class Past:
    """What comes before the tokens of a pass.

    cache: an object that lives as long as the cache or state does; None: there is none. tokens: how many columns it
    holds. real: int64 [B], how many of these are no padding; None if only the pass's attention mask can say it.
    problem: why this can't be known, else None.
    """

    cache: Any = None
    tokens: int = 0
    real: Tensor | None = None
    problem: str | None = None


@dataclass(frozen=True, eq=False)
class CachedPrompts:
    """What a key-value cache holds. read: how many of the cached tokens are prompt; −1: unknown."""

    prompts: tuple[Prompt, ...]
    read: tuple[int, ...]
    written: Written


@dataclass(eq=False)
class Run:
    """One pass of a stack over [rows, length] tokens. given: its arguments. encoded: what its cross-attention reads."""

    given: dict[str, Any]
    shape: tuple[int, int]
    device: torch.device
    past: Past
    encoded: weakref.ref[Tensor] | None
    problem: str | None
    before: Tensor | None = field(default=None, init=False)
    """In a decoder: what the encoder returned since the last pass, of which `encoded` may be a copy."""
    sequences: Sequences | None = field(default=None, init=False)
    """Built when they are first asked for."""
    texts: Texts | None = field(default=None, init=False)
    """What its rows were given to read; worked out when a module first asks."""
    over: bool = field(default=False, init=False)
    """Whether the pass has ended: a module that runs later recomputes it."""
    memory: PassMemory | None = field(default=None, init=False)
    """What a router keeps of its sequences; made when a module first asks."""
    uncached: CachedPrompts | None = field(default=None, init=False)
    """What the cache will hold that the model makes inside the pass, if none was given."""

    def built(self) -> Sequences:
        if self.sequences is None:
            self.sequences = self._build()
        return self.sequences

    def selected(self, rows: Tensor) -> Run:
        """The run as if it had been of these rows (int64 [n]) alone. Of an encoder's run, which continues nothing."""

        def of(x: Any) -> Any:
            return x[rows.to(x.device)] if isinstance(x, Tensor) and len(x) == self.shape[0] else x

        given = {name: of(value) for name, value in self.given.items()}
        found = Run(given, (len(rows), self.shape[1]), self.device, self.past, None, self.problem)
        if self.memory is not None:
            found.memory = PassMemory(
                found.built(), self.memory.previous, self.memory.whole, of(self.memory.after)
            )
        return found

    def _build(self) -> Sequences:
        (batch, length), past, problem = self.shape, self.past, self.problem
        try:
            positions, real = positions_from(
                self.given["attention_mask"], batch, length, past.tokens, self.device, past.real
            )
        except RoutingError as error:  # raised when somebody asks: most routers look at activations alone
            problem = problem or str(error)
            positions, real = positions_from(None, batch, length, past.tokens, self.device)
        given = self.given["position_ids"]
        if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == length:
            positions = given.expand(batch, length).to(torch.long)
        return Sequences(self.given["input_ids"], positions, real, past.tokens, self.encoded, problem)


class Announced(NamedTuple):
    """Prompts of a batch's rows, and what stands behind them in its cache, if the caller said that too."""

    prompts: tuple[Prompt, ...]
    written: tuple[tuple[int, ...], ...] | None


class Now(ForwardState):
    """What runs in a thread."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}  # the last run of each stack
        self.outer: nn.Module | None = None  # the decoder that runs, if one does
        self.keep: Any = None  # logits_to_keep of the head model's call
        self.encoded: Tensor | None = None  # what the encoder returned, until a decoder reads it
        self.returned: Tensor | None = None  # the same, until the encoder returns again
        self.announced: Announced | None = None  # of the passes to come


def run_of(given: dict[str, Any], caches: Caches) -> Run:
    """The run of a stack that was called with `given`."""
    source, problem = given.get("input_ids"), None
    if not isinstance(source, Tensor):
        source = given.get("inputs_embeds")
    if not isinstance(source, Tensor) or source.ndim < 2:
        source = torch.empty(0, 0)
        problem = "the pass was given neither input_ids nor inputs_embeds, [rows, tokens]."
    encoded = given.get("encoder_hidden_states")
    kept = {name: given.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
    shape = (source.shape[0], source.shape[1])
    past = caches.before(given, *shape)  # before the pass: the cache grows while it runs
    encoded = weakref.ref(encoded) if isinstance(encoded, Tensor) else None
    return Run(kept, shape, source.device, past, encoded, problem or past.problem)


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed, without those that no parameter names."""
    if not args:
        return dict(kwargs)
    bound = inspect.signature(module.forward).bind_partial(*args).arguments
    bound = {name: value for name, value in bound.items() if name not in ("args", "kwargs")}
    return {"input_ids": args[0], **bound, **kwargs}


def cache_of(found: Any) -> Any:
    """The cache among a call's arguments (by name) or in its output, as in `Past.cache`; None if there is none."""
    for name in NAMES:
        cache = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        if isinstance(cache, list | tuple) and cache and isinstance(cache[0], Tensor):
            cache = cache[0]  # RWKV's: tensors that are written into, the same objects in every pass
        if cache is not None:
            return cache
    return None


class Caches:
    """Counts the tokens of caches that don't: those of recurrent states alone (Mamba, RWKV)."""

    def __init__(self) -> None:
        self._known = ForgottenByCopies()

    def before(self, given: Mapping[str, Any], rows: int, length: int) -> Past:
        """What comes before a pass over [rows, length] tokens, which was called with `given`."""
        if given.get("cache") is not None and given.get("cu_seq_lens_q") is not None:
            # transformers' continuous batching: sequences side by side in one row, whose positions are given. The
            # caller says what comes before each of them (BatchPlan).
            return Past()
        if (other := next((name for name in _UNKNOWN if given.get(name) is not None), None)) is not None:
            return Past(problem=f"the pass continues `{other}`, which doesn't say how many tokens it holds.")
        cache = cache_of(given)
        if cache is None:
            return Past()
        if isinstance(cache, list | tuple):
            return Past(
                problem=f"a cache that is a {type(cache).__name__} doesn't say how many tokens it holds."
            )
        if (tokens := length_of(cache)) is not None:
            return Past(cache, tokens)
        known: Past | None = self._known.pop(cache, None)  # put back when the pass has ended well
        if _any_layer(cache, "record_past"):
            return Past(
                cache,
                problem=f"a {type(cache).__name__} of recurrent states may be reset to an earlier state unseen.",
            )
        if hasattr(cache, "layers") and not _any_layer(cache, "has_previous_state"):
            return Past(cache)
        if known is not None and (known.real is None or rows % len(known.real) == 0):
            real = None if known.real is None else known.real.repeat_interleave(rows // len(known.real))
            return Past(cache, known.tokens, real)
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > length:
            return Past(cache, mask.shape[1] - length)
        return Past(
            cache,
            problem=f"the pass continues a {type(cache).__name__} that doesn't count its tokens, and whose earlier "
            "passes weren't seen. Give the attention mask of all tokens, or begin without a cache.",
        )

    def after(self, given: Mapping[str, Any], output: Any, past: Past, rows: int, length: int) -> None:
        """The pass has ended: what its cache holds now."""
        cache = past.cache if past.cache is not None else cache_of(output)
        if (
            cache is None
            or isinstance(cache, list | tuple)
            or past.problem is not None
            or length_of(cache) is not None
        ):
            return
        if (real := _real(given.get("attention_mask"), past, rows, length)) is not None:
            self._known[cache] = Past(tokens=past.tokens + length, real=real)


def _real(mask: Any, past: Past, rows: int, length: int) -> Tensor | None:
    """int64 [rows], how many real tokens there are after this pass; None if that isn't known."""
    if isinstance(mask, Tensor) and mask.shape == (rows, past.tokens + length):
        return mask.long().sum(1)
    if mask is None:
        new = torch.full((rows,), length)
    elif isinstance(mask, Tensor) and mask.shape == (rows, length):
        new = mask.long().sum(1)
    else:
        return None
    if not past.tokens:
        return new
    return None if past.real is None else past.real.to(new.device) + new


def length_of(cache: Any) -> int | None:
    """How many tokens a cache says it holds; None if it doesn't count them."""
    if isinstance(cache, Tensor):
        return None
    if (count := getattr(cache, "get_seq_length", None)) is None:
        offset = getattr(cache, "seqlen_offset", None)  # xLSTM's
        return None if offset is None else int(offset)
    try:
        found = count()
    except ValueError:  # it has recurrent states only
        return None
    if found == 0:  # RecurrentGemma's first layers keep nothing there
        counts = (getattr(layer, "get_seq_length", None) for layer in getattr(cache, "layers", ()))
        found = max((one() for one in counts if one is not None), default=0)
    return None if found is None else int(found)


def _any_layer(cache: Any, flag: str) -> bool:
    """Whether a layer of a cache of recurrent states has this flag, which may be one for each of its states."""
    for layer in getattr(cache, "layers", ()):
        found = getattr(layer, flag, False)
        if any(found.values()) if isinstance(found, dict) else found:
            return True
    return False
