"""Which prompt each row of a running pass works on: told by whoever runs the batch, or found out and followed from pass to pass.

A pass without a cache behind it gives its rows' prompts: all their real tokens. Later passes inherit by the cache object that they go on
with; an encoder–decoder's decoder by the encoder's output. What can't be followed exactly is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from phatgoose.errors import RoutingError
from phatgoose.models.context.caches import Past, cache_of
from phatgoose.ops.forward_state import ForwardState
from phatgoose.routers.context import Prompt, Sequences, Texts

TELL = "Say what each row was given to read: `with prompted(model, [...]):` around the call."


Told = tuple[tuple[Prompt, ...], tuple[tuple[int, ...], ...] | None]
"""Prompts of a batch's rows, and, if that was said, what stands behind them in its cache."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The arguments of one pass that say what it goes on with."""

    past: Past
    mask: Any
    encoded: Any
    """What cross-attention reads, in a decoder."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What is known of the sequences in a key-value cache. read: how many of the cached tokens are prompt; written: as in Texts."""

    prompts: tuple[Prompt, ...]
    read: tuple[int, ...]
    written: tuple[tuple[int, ...] | str, ...]


class _Now(ForwardState):
    """What was told of the rows of one thread's passes, and each stack's running pass."""

    def __init__(self) -> None:
        self.told: Told | None = None
        self.passes: dict[str, Pass] = {}
        self.built: dict[str, Texts] = {}
        self.pending: dict[str, Kept] = {}
        self.encoded: Tensor | None = None


class PromptTracker:
    """Follows the prompts of one model's passes. A cache may be gone on with in another thread than the one it was made in."""

    def __init__(self, encoder_decoder: bool, sequences: Callable[[str], Sequences | None]):
        """`sequences` finds the tokens of the last pass of a stack."""
        self.encoder_decoder, self.sequences = encoder_decoder, sequences
        self._now = _Now()
        self._caches: WeakIdKeyDictionary = WeakIdKeyDictionary()  # caches → Kept

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_caches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _caches=WeakIdKeyDictionary())  # nobody has a copy's caches

    @property
    def told_all(self) -> Told | None:
        return self._now.told

    @told_all.setter
    def told_all(self, told: Told | None) -> None:
        self._now.told = told

    @property
    def told(self) -> tuple[Prompt, ...] | None:
        return self.told_all[0] if self.told_all else None

    def enter(self, name: str, running: Pass) -> None:
        self._now.passes[name] = running
        self._now.built.pop(name, None)
        self._now.pending.pop(name, None)

    def leave(self, name: str, output: Any) -> None:
        if name == "encoder":
            self._now.encoded = getattr(output, "last_hidden_state", None)
        kept = self._now.pending.pop(name, None)
        if kept is not None:
            self._keep(cache_of(output), kept)

    def of(self, name: str) -> Texts:
        """The texts of the pass that the stack `name` is running.

        Raises:
            RoutingError: they can't be known.
        """
        if name not in self._now.built:
            tokens = self.sequences(name)
            if tokens is None:
                raise RoutingError("a module ran outside of a call of the model, so its text is unknown.")
            texts, kept = self._read(name, tokens, self._now.passes[name])
            self._now.built[name] = texts
            if kept is not None and self._now.passes[name].past.cache is not None:
                self._keep(self._now.passes[name].past.cache, kept)
            elif kept is not None:
                self._now.pending[name] = kept  # the cache may be made inside the pass
        return self._now.built[name]

    def _keep(self, cache: Any, kept: Kept) -> None:
        if cache is not None:
            self._caches[cache] = kept

    def _known(self, cache: Any) -> Kept | None:
        return None if cache is None else self._caches.get(cache)

    def _read(self, name: str, tokens: Sequences, running: Pass) -> tuple[Texts, Kept | None]:
        tokens.check()
        real = tokens.real.cpu()
        ids = None if tokens.ids is None else tokens.ids.cpu()
        rows = len(real)
        if name == "encoder":
            prompts = _repeated(self.told, rows) if self.told else _whole(ids, real, tokens)
            return Texts(prompts, torch.zeros_like(real), ids, ((),) * rows), None
        kept = self._known(running.past.cache) if tokens.past else None
        if self.encoder_decoder:
            prompts, read = self._decoders(rows, kept, running), (0,) * rows
            fresh = real
        elif tokens.past:
            prompts, fresh = self._continued(rows, kept), real
            # How many of the cached tokens a text that was told stands for isn't known: −1.
            told = tuple(-1 if isinstance(p, str) else len(p) for p in prompts)
            read = _expanded(kept.read, rows) if kept else told
        else:
            prompts = _repeated(self.told, rows) if self.told else _whole(ids, real, tokens)
            fresh = _behind(prompts, ids, real)
            read = tuple((real & ~fresh).sum(1).tolist())
        old = kept.written if kept else self.told_all[1] if self.told_all else None
        before = _written(prompts, read, old, running, real.shape[1])
        texts = Texts(prompts, fresh, ids, before, self.encoder_decoder)
        now = tuple(_more(one, ids, fresh, row) for row, one in enumerate(before))
        return texts, Kept(prompts, read, now)

    def _continued(self, rows: int, kept: Kept | None) -> tuple[Prompt, ...]:
        if self.told:
            return _repeated(self.told, rows)
        if kept is None:
            raise RoutingError(
                f"this pass goes on with a key-value cache whose prompts weren't seen by the router that is attached. {TELL}"
            )
        return _expanded(kept.prompts, rows)

    def _decoders(self, rows: int, kept: Kept | None, running: Pass) -> tuple[Prompt, ...]:
        """A decoder's prompts are its encoder's."""
        if self.told:
            return _repeated(self.told, rows)
        if kept is not None:
            return _expanded(kept.prompts, rows)
        read, now = self._now.encoded, running.encoded
        if not isinstance(read, Tensor) or not isinstance(now, Tensor) or not _repeats(now, read):
            raise RoutingError(
                f"the decoder reads states that this model's encoder didn't compute just before. {TELL}"
            )
        return _expanded(self.of("encoder").prompts, rows)


def _whole(ids: Tensor | None, real: Tensor, tokens: Sequences) -> tuple[Prompt, ...]:
    """All real tokens of each row."""
    if ids is None:
        raise RoutingError(f"the model was given embeddings, which have no text. {TELL}")
    positions = tokens.positions.cpu()
    if bool(((positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]).any()):
        raise RoutingError(
            f"several sequences are packed into one row, so its prompts can't be told apart. {TELL}"
        )
    return tuple(tuple(row[mask].tolist()) for row, mask in zip(ids, real, strict=True))


def _behind(prompts: Sequence[Prompt], ids: Tensor | None, real: Tensor) -> Tensor:
    """Which tokens of a first pass stand behind the prompt, where a prompt was told as tokens: bool as `real`."""
    fresh = torch.zeros_like(real)
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        places = real[row].nonzero().flatten()
        start = places[: len(prompt)]
        if len(places) < len(prompt) or (ids is not None and ids[row, start].tolist() != list(prompt)):
            raise RoutingError(f"row {row} doesn't begin with the prompt that was told for it.")
        fresh[row, places[len(prompt) :]] = True
    return fresh


def _written(
    prompts: Sequence[Prompt],
    read: Sequence[int],
    last: Sequence[tuple[int, ...] | str] | None,
    running: Pass,
    length: int,
) -> tuple[tuple[int, ...] | str, ...]:
    """What stood behind each prompt before this pass, or why that isn't known; `last` is what did after the one before."""
    past, mask = running.past.tokens, running.mask
    if not past:
        return ((),) * len(prompts)
    cached = torch.full((len(prompts),), past) if running.past.real is None else running.past.real
    if isinstance(mask, Tensor) and mask.shape == (len(prompts), past + length):
        cached = mask[:, :past].sum(1)
    before = _expanded(last, len(prompts)) if last else ((),) * len(prompts)
    found: list[tuple[int, ...] | str] = []
    for old, count, tokens in zip(before, read, cached.tolist(), strict=True):
        behind = int(tokens) - count
        if isinstance(old, str):
            found.append(old)
        elif count < 0 or len(old) < behind:
            found.append("the cache holds tokens that no routed pass saw")
        else:
            found.append(old[: max(behind, 0)])  # shorter where the cache was cropped
    seen: dict[Prompt, set[Any]] = {}
    for prompt, old in zip(prompts, found, strict=True):
        seen.setdefault(prompt, set()).add(old)
    beams = "rows of one prompt have gone apart, and may be beams, which are reordered unseen"
    return tuple(old if len(seen[p]) == 1 else beams for p, old in zip(prompts, found, strict=True))


def _more(old: tuple[int, ...] | str, ids: Tensor | None, fresh: Tensor, row: int) -> tuple[int, ...] | str:
    if isinstance(old, str):
        return old
    if ids is None:
        return "no token ids were given" if bool(fresh[row].any()) else old
    return (*old, *ids[row][fresh[row]].tolist())


def _repeats(now: Tensor, read: Tensor) -> bool:
    """Whether `now` is `read` with its rows repeated (beams)."""
    if now is read:
        return True
    if now.shape[1:] != read.shape[1:] or len(now) % max(len(read), 1):
        return False
    times = len(now) // len(read)
    return torch.equal(now.to(read.device), read.repeat_interleave(times, dim=0))


def _repeated(told: Sequence[Prompt] | None, rows: int) -> tuple[Prompt, ...]:
    assert told
    if rows % len(told):
        raise RoutingError(
            f"{len(told)} prompts were told, and the model was given {rows} rows: expected one prompt a row."
        )
    return tuple(p for p in told for _ in range(rows // len(told)))


def _expanded(kept: Sequence[Any], rows: int) -> tuple[Any, ...]:
    if rows % len(kept):
        raise RoutingError(
            f"a key-value cache of {len(kept)} sequences can't be continued in {rows} rows. {TELL}"
        )
    return tuple(one for one in kept for _ in range(rows // len(kept)))
