"""What a router may know of a token besides its activation: its sequence, position, text, and past."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops.fused import Choice


@dataclass(frozen=True, eq=False)
class Sequences:
    """The tokens that one pass of an encoder or decoder runs over: B sequences of T new tokens."""

    ids: Tensor | None
    """int64 [B, T], or None if embeddings were given."""
    positions: Tensor
    """int64 [B, T], counted without padding and past a cache."""
    real: Tensor
    """bool [B, T], False at padding."""
    past: int = 0
    """How many tokens a key-value cache holds before these."""
    encoded: weakref.ref[Tensor] | None = None
    """What a decoder's cross-attention reads: the same object in all passes over the same inputs."""
    problem: str | None = None
    """Why `real` can't be known."""

    def aligned(self, rows: int, length: int, kept: Tensor | None = None) -> Sequences:
        """The same for a module that saw [rows, length] tokens, as `spread` repeats and selects them.

        Raises:
            RoutingError: if the module's input can't be matched to the tokens, or there is a `problem`.
        """
        self.check()
        ids = None if self.ids is None else spread(self.ids, rows, length, kept)
        positions, real = (spread(x, rows, length, kept) for x in (self.positions, self.real))
        return Sequences(ids, positions, real, self.past)

    def check(self) -> None:
        """Raises RoutingError if there is a `problem`."""
        if self.problem is not None:
            raise RoutingError(self.problem)


def spread(x: Tensor, rows: int, length: int, kept: Tensor | None = None) -> Tensor:
    """x [B, T, …] of a pass → [rows, length, …] of a module.

    Each sequence is repeated rows / B times (beams). Of its tokens all are taken, or those at `kept`.

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
    """What each of a pass's B sequences was given to read, and what has been written behind it so far."""

    prompts: tuple[Prompt, ...]
    """One per sequence."""
    fresh: Tensor
    """bool [B, T] on the CPU: which of the pass's tokens are behind the prompt."""
    ids: Tensor | None
    """int64 [B, T] on the CPU, or None."""
    written: tuple[tuple[int, ...] | str, ...]
    """For each sequence what was behind the prompt before this pass, or why that isn't known."""
    apart: bool = False
    """Whether the written text is a sequence of its own (an encoder–decoder's), not the prompt's continuation."""


@dataclass(eq=False)
class PassMemory:
    """What a router that `remembers` knows of a pass's B sequences, and leaves to the passes after it.

    There is one for each pass, whichever module asks. Of an encoder–decoder it is that of the encoder's pass, for the
    decoder's modules too.
    """

    sequences: Sequences
    previous: Callable[[], Tensor | None]
    """Reads `after` of the passes before, at each sequence's last token: [B, …], with zeros for sequences that begin;
    None if all of them do. Raises RoutingError, saying why and what to do, if that can't be known."""
    whole: bool = False
    """Whether the pass holds all that there is to read of its sequences, as an encoder's does."""
    after: Tensor | None = None
    """[B, T, …], set by the router: what a pass after each of these tokens is to find. [B, 1, …] if it is `whole`."""
    notes: dict[object, Tensor] = field(default_factory=dict)
    """What routers keep for the length of this pass, each [B, T or 1, …]."""
    choices: dict[object, Choice] = field(default_factory=dict)
    """Of modules that see the whole pass, for its B·T tokens."""


@dataclass(frozen=True, eq=False)
class RoutingContext:
    """One call of one module: its path, and which tokens of the running pass it sees.

    These are [rows, length]: all tokens of each sequence, or those at `kept`.
    """

    path: str
    rows: int
    length: int
    sequences: Sequences | None
    """The sequences of the pass. None: no pass was seen."""
    allowed: Tensor | None = None
    """bool [N, candidates]: which candidates may be chosen; None: all. A router that narrows its choice in
    steps must heed it in the first one. The final scores are masked by it anyway."""
    reader: Callable[[str], Texts] | None = None
    """Finds the texts of the pass that the module runs in."""
    recall: Callable[[], PassMemory] | None = None
    """Finds the memory of the pass that the module runs in."""
    kept: Tensor | None = None
    """int64 [length]: the positions in each sequence that the module sees. None: all."""
    stream: str = "decoder"
    """Whose tokens they are, "encoder" or "decoder"."""
    problem: str | None = None
    """Why it can't be known which tokens the module sees."""
    by_row: bool = True
    """Whether the pass's sequences are its rows even if there is a `problem`."""
    picked: Tensor | None = None
    """int64 [N]: which of the pass's B·T tokens these are, if they were picked for one of a mixture's experts.
    Then rows is 1."""
    again: int = 0
    """How many of each row's first inputs are cached tokens that are seen again. Then that is the `problem`."""
    on: Tensor | None = None
    """bool [R, experts of the pool]: which experts are switched on, for R rows of which each is repeated as often as
    needed; None: all. For a router that chooses among the whole pool, whose scores nobody masks."""

    def texts(self) -> Texts:
        """What this pass's sequences were given to read; one object for all modules that see the pass.

        Raises RoutingError, saying why and what to do, if that can't be known.
        """
        if self.reader is None:
            raise RoutingError(
                f"the text that module {self.path} works on is unknown: attach the router with route()."
            )
        return self.reader(self.stream)

    def memory(self) -> PassMemory:
        """What is known of this pass's sequences from passes before; one object for all modules that see the pass.

        Raises RoutingError, saying why, if that can't be known.
        """
        if self.recall is None:
            raise RoutingError(
                f"what module {self.path} has read before is unknown: attach the router with route()."
            )
        return self.recall()

    def tokens(self) -> Sequences:
        """The sequences, matched to the module's N = rows·length tokens.

        Raises:
            RoutingError: if the model was called in a way that hides them, or the module sees other tokens, or
                some of them.
        """
        self.check()
        assert self.sequences is not None
        if (picked := self.picked) is None:
            return self.sequences.aligned(self.rows, self.length, self.kept)
        seen = self.sequences
        ids = None if seen.ids is None else seen.ids.reshape(-1)[picked.to(seen.ids.device)][None]
        positions, real = (x.reshape(-1)[picked.to(x.device)][None] for x in (seen.positions, seen.real))
        return Sequences(ids, positions, real, seen.past)

    def check_whole(self) -> None:
        """Raises RoutingError, saying why, unless the module sees all tokens of the pass, in order."""
        self.check()
        assert self.sequences is not None
        if (
            self.picked is not None
            or self.kept is not None
            or (self.rows, self.length) != self.sequences.real.shape
        ):
            raise RoutingError(
                f"{self.path} sees {unmatched((self.rows, self.length), *self.sequences.real.shape)}."
            )

    def new(self) -> RoutingContext:
        """The same call without the tokens that are seen again."""
        return replace(self, length=self.length - self.again, again=0, problem=None) if self.again else self

    def whole(self) -> RoutingContext:
        """For tokens that were picked: the call of a module that sees all tokens of the pass."""
        assert self.sequences is not None
        rows, length = self.sequences.positions.shape
        return replace(self, rows=rows, length=length, picked=None)

    def spread(self, x: Tensor) -> Tensor:
        """x [B, T, …] of a pass, or [B, 1, …] of its sequences → [N, …] of the module's tokens. Raises as `tokens`."""
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

    Args:
        mask: [B, past + T], or [B, T] of the new tokens alone. Or, as generate() makes it for a static cache,
            who may attend to whom, [B or 1, 1, T, ≥ past + T], boolean or added to scores, or a dict of such
            masks for different layers. Or None.
        before: int64 [B], how many of the cached tokens are real. None: all `past`, unless the mask says otherwise.

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
    found = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    raise RoutingError(
        f"padding can't be told from tokens: the attention mask is {found}, expected [sequences, tokens]. "
        "Use generate()'s default cache and an attention that takes such masks."
    )
