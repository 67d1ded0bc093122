"""What a router may know beyond a token's activation: which sequence, position and token it belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phatgoose.errors import RoutingError


@dataclass(frozen=True, eq=False)
class Sequences:
    """The tokens one pass of an encoder or decoder runs over: B sequences of T new tokens.

    ids: int64 [B, T] or None (embeddings were given). positions: int64 [B, T], counted without padding and past a cache.
    real: bool [B, T], False at padding. past: how many tokens a key-value cache holds before these. encoded: what a decoder's
    cross-attention reads, the same object in all passes over the same inputs. problem: why `real` can't be known, else None.
    """

    ids: Tensor | None
    positions: Tensor
    real: Tensor
    past: int = 0
    encoded: weakref.ref[Tensor] | None = None
    problem: str | None = None

    def aligned(self, rows: int, length: int, kept: Tensor | None = None) -> Sequences:
        """The same for a module that saw [rows, length]: each sequence rows / B times (beams), and of each all tokens or those at `kept`.

        Raises:
            RoutingError: if the module's input can't be matched to the tokens, or there is a `problem`.
        """
        self.check()

        def fit(x: Tensor) -> Tensor:
            return spread(x, rows, length, kept)

        ids = None if self.ids is None else fit(self.ids)
        return Sequences(ids, fit(self.positions), fit(self.real), self.past)

    def check(self) -> None:
        """Raises RoutingError if there is a `problem`."""
        if self.problem is not None:
            raise RoutingError(self.problem)


def spread(x: Tensor, rows: int, length: int, kept: Tensor | None = None) -> Tensor:
    """x [B, T, …] of a pass → [rows, length, …] for a module: each sequence rows / B times (beams), all its tokens or those at `kept`.

    Raises:
        RoutingError: if the module's input can't be matched to the tokens.
    """
    b, t = x.shape[:2]
    if kept is not None:
        x = x[:, kept.to(x.device)]
    if rows % b or length != x.shape[1]:
        raise RoutingError(f"{unmatched((rows, length), b, t)}.")
    return x.repeat_interleave(rows // b, dim=0)


def unmatched(shape: Sequence[int], batch: int, length: int) -> str:
    return (
        f"a module saw {list(shape)} tokens, the model was given [{batch}, {length}]: they can't be matched"
    )


Prompt = str | tuple[int, ...]
"""What a sequence was given to read: its text, or its token ids."""


@dataclass(frozen=True, eq=False)
class Texts:
    """What each of a pass's B sequences was given to read, and what stands behind it so far.

    prompts: one a sequence. fresh: bool [B, T] on the CPU, which of the pass's tokens stand behind the prompt. ids: int64 [B, T] on the
    CPU, or None. written: what stood behind the prompt before this pass, or why that isn't known. apart: whether what is written is a
    sequence of its own (an encoder–decoder's), not the prompt's continuation.
    """

    prompts: tuple[Prompt, ...]
    fresh: Tensor
    ids: Tensor | None
    written: tuple[tuple[int, ...] | str, ...]
    apart: bool = False


@dataclass(frozen=True, eq=False)
class RoutingContext:
    """One call of one module: its path, and which of the running pass's tokens it sees.

    They are [rows, length]: all of each sequence's tokens, or those at `kept` (int64 [length]). sequences: those of the pass; None: no pass
    was seen. allowed: bool [N, candidates], which of them may be chosen; None: all. A router that narrows its choice down in steps must
    heed it in the first; what may not be chosen is struck out of its scores anyway. reader: finds the texts of the pass a module runs in.
    stream: whose tokens they are, "encoder" or "decoder". problem: why it can't be known which tokens the module sees, else None.
    picked: int64 [N], which of the pass's B·T tokens these are, where they were picked for one of a mixture's experts; rows is then 1.
    """

    path: str
    rows: int
    length: int
    sequences: Sequences | None
    allowed: Tensor | None = None
    reader: Callable[[str], Texts] | None = None
    kept: Tensor | None = None
    stream: str = "decoder"
    problem: str | None = None
    by_row: bool = True
    """Whether the pass's sequences are its rows even where there is a `problem`."""
    picked: Tensor | None = None
    again: int = 0
    """How many of each row's inputs, the first ones, are cached tokens that are seen again: the `problem`, then."""

    def texts(self) -> Texts:
        """What the sequences of this pass were given to read; the same object for every module that sees the pass.

        Raises:
            RoutingError: it can't be known; the message says why and what to do.
        """
        if self.reader is None:
            raise RoutingError(
                f"the text that module {self.path} works on is unknown: attach the router with route()."
            )
        return self.reader(self.stream)

    def tokens(self) -> Sequences:
        """The sequences matched to the module's N = rows·length tokens.

        Raises:
            RoutingError: if the model was called in a way that hides them, or the module sees other tokens, or some of them.
        """
        self.check()
        assert self.sequences is not None
        if (picked := self.picked) is None:
            return self.sequences.aligned(self.rows, self.length, self.kept)
        seen = self.sequences
        ids, positions, real = (
            None if x is None else x.reshape(-1)[picked.to(x.device)][None]
            for x in (seen.ids, seen.positions, seen.real)
        )
        assert positions is not None
        assert real is not None
        return Sequences(ids, positions, real, seen.past)

    def new(self) -> RoutingContext:
        """The same call without the tokens that are seen again."""
        return replace(self, length=self.length - self.again, again=0, problem=None) if self.again else self

    def whole(self) -> RoutingContext:
        """Of tokens that were picked: a call that sees all of the pass's."""
        assert self.sequences is not None
        rows, length = self.sequences.positions.shape
        return replace(self, rows=rows, length=length, picked=None)

    def spread(self, x: Tensor) -> Tensor:
        """x [B, T, …] of the pass, or [B, 1, …] of its sequences → [N, …] for the module's tokens.

        Raises:
            RoutingError: as `tokens`.
        """
        if self.picked is not None:
            self.check()
            return self.whole().spread(x)[self.picked.to(x.device)]
        by_row = x.shape[1] == 1 and self.by_row
        if self.problem is not None and not by_row:
            raise RoutingError(f"{self.path}: {self.problem}")
        if by_row:
            return spread(x.expand(-1, self.length, *x.shape[2:]), self.rows, self.length).flatten(0, 1)
        return spread(x, self.rows, self.length, self.kept).flatten(0, 1)

    def check(self) -> None:
        """Raises RoutingError, saying why, unless it is known which tokens the module sees."""
        if self.problem is not None:
            raise RoutingError(f"{self.path}: {self.problem}")
        if self.sequences is None:
            raise RoutingError(
                f"module {self.path} ran outside of a call of the model, so its tokens' positions are unknown."
            )
        self.sequences.check()


def positions_from(
    mask: object, batch: int, length: int, past: int, device: torch.device, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(positions, real), both [B, T], of T new tokens after `past` cached ones.

    mask: [B, past + T]; or [B, T], of the new tokens alone; or, as generate() makes it for a static cache, [B or 1, 1, T, ≥ past + T], who
    may attend to whom, boolean or added to scores, or a dict of such for different layers; or None. before: int64 [B], how many
    of the cached tokens are real; None: all `past`, unless the mask says otherwise.

    Raises:
        RoutingError: it is something else, so padding can't be told from tokens.
    """
    if isinstance(mask, dict):  # layers with a sliding window have a mask of their own, of another width
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    start = torch.full((batch, 1), past) if before is None else before[:, None]
    positions = start.to(device) + torch.arange(length, device=device)
    if mask is None:
        return positions, torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] in (length, past + length):
        whole = mask.to(device).bool()
        counted = whole.long().cumsum(1) - 1
        if mask.shape[1] == length:
            counted = counted + start.to(device)
        return counted.clamp(min=0)[:, -length:], whole[:, -length:]
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] >= past + length == past + mask.shape[2]:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        # A token attends to itself, and nobody to padding.
        real = allowed[:, 0, :, past : past + length].diagonal(dim1=1, dim2=2)
        return positions, real.to(device).expand(batch, length)
    raise RoutingError(
        f"padding can't be told from tokens: the attention mask is {_described(mask)}, expected [sequences, tokens]. "
        "Use generate()'s default cache and an attention that takes such masks."
    )


def _described(mask: object) -> str:
    return f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
