"""Which prompt each row of a running pass works on, followed from pass to pass.

Routers that read text choose by the prompt, and nobody tells a forward hook what it is. `PromptTracker` follows it:

1. A pass without a cache behind it reads its rows' prompts: all of their real tokens.
2. These are remembered with the cache that the pass fills: with the object, held weakly, so they are forgotten with it.
3. A later pass inherits the prompts of the cache it continues. Its tokens stand behind them. Its rows may be
   repeated (beams).
4. In an encoder–decoder the encoder reads the prompts. The decoder inherits them by the states that the encoder
   returned, which it is given to cross-attend to, and later by its own cache.
5. Where none of this holds, the caller announces the prompts (`prompted`).

What can't be followed exactly is refused, not guessed. What was written behind a prompt is followed too, but it may
be unknown: then the reason stands in its place, and only a router that asks for it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.context.matching import is_repeated
from phatgoose.models.context.runs import (
    Announced,
    CachedPrompts,
    ForgottenByCopies,
    Now,
    Run,
    Written,
    cache_of,
)
from phatgoose.routers.context import Prompt, Sequences, Texts

ADVICE = "Say what each row was given to read: `with prompted(model, [...]):` around the call."


class PromptTracker:
    """Follows the prompts of one model's passes, from thread to thread if a cache is continued in another one."""

    def __init__(self, encoder_decoder: bool, now: Now):
        self.encoder_decoder, self._now = encoder_decoder, now
        self._caches = ForgottenByCopies()  # → CachedPrompts

    def announce(self, announced: Announced | None) -> Announced | None:
        """Sets the prompts of this thread's passes to come (None: follow them); returns what was set before."""
        before, self._now.announced = self._now.announced, announced
        return before

    def leave(self, stack: str, run: Run, output: Any) -> None:
        """A stack's pass has ended."""
        if stack == "encoder":
            self._now.returned = getattr(output, "last_hidden_state", None)
        # The pass began without a cache. If it made one, that is in its output.
        if run.uncached is not None and (cache := cache_of(output)) is not None:
            self._caches[cache] = run.uncached

    def texts_of(self, stack: str) -> Texts:
        """The texts of the pass that a stack is running; worked out when a module first asks. Raises RoutingError if
        they can't be known."""
        if (run := self._now.runs.get(stack)) is None:
            raise RoutingError("a module ran outside of a call of the model, so its text is unknown.")
        if run.texts is None:
            run.texts, cached = self._read(stack, run)
            # Without a cache argument, the model may make a cache inside the pass: `leave` finds it in the output.
            if run.past.cache is None:
                run.uncached = cached
            elif cached is not None:
                self._caches[run.past.cache] = cached
        return run.texts

    def _read(self, stack: str, run: Run) -> tuple[Texts, CachedPrompts | None]:
        """A pass's texts, and what its cache will then hold (None for an encoder, which has none)."""
        tokens = run.built()
        tokens.check()
        announced = self._now.announced
        real = tokens.real.cpu()
        ids = None if tokens.ids is None else tokens.ids.cpu()
        rows = len(real)
        # An empty cache is no continuation, even if it is an object that was used before (and reset).
        continues = tokens.past and run.past.cache is not None
        cached: CachedPrompts | None = self._caches.get(run.past.cache) if continues else None
        # Announced prompts go first: whoever announces them knows better than the cache.
        if announced is not None:
            prompts = _repeat_announced(announced, rows)
        elif stack == "encoder" or not (self.encoder_decoder or tokens.past):
            prompts = _all_tokens(ids, real, tokens)
        elif cached is not None:
            prompts = _repeat_cached(cached.prompts, rows)
        elif self.encoder_decoder:
            prompts = self._encoder_prompts(run, rows)
        else:
            raise RoutingError(
                "this pass continues a key-value cache whose prompts weren't seen by the router that is attached. "
                f"{ADVICE}"
            )
        if stack == "encoder":
            return Texts(prompts, torch.zeros_like(real), ids, ((),) * rows), None
        # Nothing of the prompt is in the sequence of an encoder–decoder's decoder.
        fresh, read = real, (0,) * rows
        if not self.encoder_decoder and tokens.past:
            # How many cached tokens an announced text stands for isn't known.
            read = tuple(-1 if isinstance(p, str) else len(p) for p in prompts)
            read = _repeat_cached(cached.read, rows) if cached else read
        elif not self.encoder_decoder:
            # A first pass. What stands behind an announced prompt (as an answer that is scored) was written.
            fresh = _behind_prompt(prompts, ids, real)
            read = tuple((real & ~fresh).sum(1).tolist())
        last: Sequence[tuple[int, ...] | str] | None = announced.written if announced else None
        before = _written_before(prompts, read, cached.written if cached else last, run)
        texts = Texts(prompts, fresh, ids, before, self.encoder_decoder)
        written = tuple(_append(old, ids, fresh, row) for row, old in enumerate(before))
        return texts, CachedPrompts(prompts, read, written)

    def _encoder_prompts(self, run: Run, rows: int) -> tuple[Prompt, ...]:
        """A decoder's prompts in its first pass: its encoder's."""
        # The encoder's last pass is this decoder's only if the decoder was given what that pass returned, perhaps
        # repeated for beams.
        returned, given = self._now.returned, None if run.encoded is None else run.encoded()
        if not isinstance(returned, Tensor) or given is None or not is_repeated(given, returned):
            raise RoutingError(
                f"the decoder reads states that this model's encoder didn't compute just before. {ADVICE}"
            )
        return _repeat_cached(self.texts_of("encoder").prompts, rows)


def _all_tokens(ids: Tensor | None, real: Tensor, tokens: Sequences) -> tuple[Prompt, ...]:
    """All real tokens of each row."""
    if ids is None:
        raise RoutingError(f"the model was given embeddings, which have no text. {ADVICE}")
    # Positions that begin again within a row are those of another sequence.
    positions = tokens.positions.cpu()
    if bool(((positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]).any()):
        raise RoutingError(
            f"several sequences are packed into one row, so its prompts can't be told apart. {ADVICE}"
        )
    return tuple(tuple(row[mask].tolist()) for row, mask in zip(ids, real, strict=True))


def _behind_prompt(prompts: Sequence[Prompt], ids: Tensor | None, real: Tensor) -> Tensor:
    """Which tokens of a first pass stand behind the prompt, bool as `real`; none if it was announced as text."""
    fresh = torch.zeros_like(real)
    for row, prompt in enumerate(prompts):
        # A text's tokens aren't known here, so all of the row counts as prompt.
        if isinstance(prompt, str):
            continue
        columns = real[row].nonzero().flatten()
        start = columns[: len(prompt)]
        if len(columns) < len(prompt) or (ids is not None and ids[row, start].tolist() != list(prompt)):
            raise RoutingError(f"row {row} doesn't begin with the prompt that was announced for it.")
        fresh[row, columns[len(prompt) :]] = True
    return fresh


def _written_before(
    prompts: Sequence[Prompt],
    read: Sequence[int],
    last: Sequence[tuple[int, ...] | str] | None,
    run: Run,
) -> Written:
    """What stood behind each prompt before this pass, or why that isn't known. last: the same after the last pass."""
    past, mask = run.past.tokens, run.given["attention_mask"]
    # A first pass has nothing behind its prompts.
    if not past:
        return ((),) * len(prompts)
    # How many real tokens each row has in the cache: the mask of this pass says it, where it covers the cache.
    cached = torch.full((len(prompts),), past) if run.past.real is None else run.past.real
    if isinstance(mask, Tensor) and mask.shape == (len(prompts), past + run.shape[1]):
        cached = mask[:, :past].sum(1)
    before = _repeat_cached(last, len(prompts)) if last else ((),) * len(prompts)
    found: list[tuple[int, ...] | str] = []
    for old, count, tokens in zip(before, read, cached.tolist(), strict=True):
        behind = int(tokens) - count
        if isinstance(old, str):
            found.append(old)
        elif count < 0 or len(old) < behind:
            found.append("the cache holds tokens that no routed pass saw")
        else:
            # Shorter than before if the cache was cropped, as when drafts were rejected.
            found.append(old[: max(behind, 0)])
    # Beam search moves rows of the cache, which no hook sees. Rows of one prompt that differ may have changed places.
    by_prompt: dict[Prompt, set[Any]] = {}
    for prompt, old in zip(prompts, found, strict=True):
        by_prompt.setdefault(prompt, set()).add(old)
    beams = "rows of one prompt differ, and may be beams, which are reordered unseen"
    return tuple(old if len(by_prompt[p]) == 1 else beams for p, old in zip(prompts, found, strict=True))


def _append(old: tuple[int, ...] | str, ids: Tensor | None, fresh: Tensor, row: int) -> tuple[int, ...] | str:
    """What stands behind a row's prompt after a pass."""
    if isinstance(old, str):
        return old
    if ids is None:
        return "no token ids were given" if bool(fresh[row].any()) else old
    return (*old, *ids[row][fresh[row]].tolist())


def _repeat_announced(announced: Announced, rows: int) -> tuple[Prompt, ...]:
    prompts = announced.prompts
    if rows % len(prompts):
        raise RoutingError(
            f"{len(prompts)} prompts were announced, and the model was given {rows} rows: expected one prompt a row."
        )
    return tuple(p for p in prompts for _ in range(rows // len(prompts)))


def _repeat_cached(cached: Sequence[Any], rows: int) -> tuple[Any, ...]:
    if rows % len(cached):
        raise RoutingError(
            f"a key-value cache of {len(cached)} sequences can't be continued in {rows} rows. {ADVICE}"
        )
    return tuple(one for one in cached for _ in range(rows // len(cached)))
