"""What runs inside a traced model: takes in every module's choices at little cost, and sums them up now and then.

A call of `record` copies the choices and their weights to int16 and half precision and returns; nothing is looked at, moved
between devices or waited for. Every FLUSH decisions, between two passes (and at the end), what is pending is brought to the CPU in large pieces:
padding is left out, candidates become indices of the pool's experts, and either choices or only sums are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phatgoose.routers.context import RoutingContext, Sequences

if TYPE_CHECKING:
    from phatgoose.models.trace import Trace

FLUSH = 2**18
"""Pending decisions (tokens × modules) at which they are summed up: about 10 MB at two choices each."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """N real tokens, in the order they were read.

    rows, positions: int64 [N], the row of the batch and the place in the sequence. inputs: int64 [N], which sequence of the
    whole trace (beams of one input share its number). ids: int64 [N], −1 where the model was given embeddings. generated:
    bool [N], True for a token read behind a key-value cache. draws: float32 [N] in [0, 1), what sampling goes by.
    """

    rows: Tensor
    positions: Tensor
    inputs: Tensor
    ids: Tensor
    generated: Tensor
    draws: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, keep: Tensor) -> Tokens:
        return Tokens(*(getattr(self, name)[keep] for name in TOKEN_FIELDS))


TOKEN_FIELDS = ("rows", "positions", "inputs", "ids", "generated", "draws")


def joined(parts: list[Tokens]) -> Tokens:
    """All of them, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(*(torch.cat([getattr(part, name) for part in parts]) for name in TOKEN_FIELDS))


@dataclass(eq=False)
class _Pass:
    """One run of a stack as one module saw it; its tokens are worked out when they are needed."""

    sequences: Sequences
    rows: int
    length: int
    first_input: int
    rows_per_input: int
    generated: bool
    tokens: Tokens | None = None
    real: Tensor | None = None


_Pending = tuple[_Pass, tuple[int, ...], Tensor, Tensor, Tensor | None]


class Recorder:
    """Fills a Trace; `models/routed.py` calls `record` for every call of every module."""

    def __init__(self, trace: Trace, *, histogram: bool, margins: bool, sample: float, max_bytes: int):
        self.trace, self.histogram, self.max_bytes = trace, histogram, max_bytes
        self.wants_scores = margins and not histogram
        self.trace.share = sample
        self._pending: dict[str, list[_Pending]] = {}
        self._decisions = 0
        self._passes: dict[tuple[str, int, int], _Pass] = {}
        self._inputs = self._rows = 0  # sequences of earlier sessions, and of this one
        self._random = torch.Generator().manual_seed(0)

    def record(
        self,
        context: RoutingContext,
        members: tuple[int, ...],
        chosen: Tensor,
        weights: Tensor,
        scores: Tensor | None,
    ) -> None:
        """Takes in one module's choices among its candidates: int64 [N, k] and weights [N, k]; scores [N, candidates] or None."""
        margin = None if scores is None else _margins(scores.detach(), chosen)
        half = torch.float32 if self.histogram else torch.float16
        entry = (
            self._pass(context),
            members,
            chosen.to(torch.int16),
            weights.detach().to(half, copy=True),
            margin,
        )
        self._pending.setdefault(context.path, []).append(entry)
        self._decisions += chosen.shape[0]

    def _pass(self, context: RoutingContext) -> _Pass:
        if context.sequences is None:
            context.tokens()  # raises, saying why
            raise AssertionError
        key = (self.trace.places[context.path].reads, context.rows, context.length)
        known = self._passes.get(key)
        if known is None or known.sequences is not context.sequences:
            if not any(p.sequences is context.sequences for p in self._passes.values()):
                self._new_sequences(key[0], context.sequences)
            known = self._passes[key] = _Pass(
                context.sequences, context.rows, context.length, self._inputs, context.rows // max(self._rows, 1),
                context.sequences.past > 0 and key[0] == "decoder",
            )  # fmt: skip
        return known

    def _new_sequences(self, reads: str, sequences: Sequences) -> None:
        """A stack runs over new tokens: of new inputs, unless it goes on behind a cache or is the decoder of an encoder's."""
        if (
            self._decisions >= FLUSH
        ):  # only between passes, so that all modules of a pass are summed up together
            self.flush()
        self._passes = {key: one for key, one in self._passes.items() if key[0] != reads}
        begins = sequences.past == 0 and (reads == "encoder" or not self.trace.encoder_decoder)
        rows = sequences.positions.shape[0]
        if begins or self._rows == 0 or rows % self._rows:
            self._inputs, self._rows = self._inputs + self._rows, rows

    def flush(self) -> None:
        """Sums up what is pending."""
        pending, self._pending, self._decisions = self._pending, {}, 0
        groups: dict[tuple[int, ...], tuple[Tokens, Tensor | None]] = {}
        for path, calls in pending.items():
            key = tuple(id(call[0]) for call in calls)
            if key not in groups:
                groups[key] = self._tokens([call[0] for call in calls])
            tokens, keep = groups[key]
            members = torch.tensor(
                (*calls[0][1], -1), dtype=torch.int16
            )  # a choice of −1 reads the last entry
            k = max(call[2].shape[1] for call in calls)
            experts = members[torch.cat([_widened(call[2], k, -1) for call in calls]).cpu().long()]
            weights = torch.cat([_widened(call[3], k, 0) for call in calls]).cpu()
            scored = [call[4] for call in calls if call[4] is not None]
            margins = torch.cat(scored).cpu() if len(scored) == len(calls) else None
            if keep is not None:
                experts, weights = experts[keep], weights[keep]
                margins = None if margins is None else margins[keep]
            self.trace.take(path, tokens, experts, weights, margins, sums_only=self.histogram)
        while not self.histogram and self.trace.bytes > self.max_bytes:
            self.trace.thin(self.trace.share / 2)

    def _tokens(self, passes: list[_Pass]) -> tuple[Tokens, Tensor | None]:
        """The tokens of these passes that are kept, and which of all they are (None: all)."""
        seen = [self._seen(one) for one in passes]
        tokens = joined([one for one, _ in seen])
        keep = torch.cat([real for _, real in seen]) & (tokens.draws < self.trace.share)
        return (tokens, None) if bool(keep.all()) else (tokens[keep], keep)

    def _seen(self, one: _Pass) -> tuple[Tokens, Tensor]:
        """All tokens of a pass, worked out once, and which are real."""
        if one.tokens is None or one.real is None:
            aligned = one.sequences.aligned(one.rows, one.length)
            rows = torch.arange(one.rows)[:, None].expand(-1, one.length).reshape(-1)
            one.real = aligned.real.reshape(-1).cpu()
            one.tokens = Tokens(
                rows,
                aligned.positions.reshape(-1).cpu().long(),
                one.first_input + rows // max(one.rows_per_input, 1),
                torch.full_like(rows, -1) if aligned.ids is None else aligned.ids.reshape(-1).cpu().long(),
                torch.full_like(one.real, one.generated),
                torch.rand(len(rows), generator=self._random),
            )
        return one.tokens, one.real


def _widened(values: Tensor, k: int, fill: int) -> Tensor:
    """[N, fewer] → [N, k]."""
    missing = k - values.shape[1]
    return values if not missing else torch.nn.functional.pad(values, (0, missing), value=fill)


def _margins(scores: Tensor, chosen: Tensor) -> Tensor:
    """The lowest chosen score minus the highest of the others: float16 [N]; NaN where nothing is chosen or nothing is left."""
    none, n = chosen < 0, scores.shape[0]
    worst = scores.gather(1, chosen.clamp(min=0)).masked_fill(none, torch.inf).amin(1)
    taken = torch.zeros(n, scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    rest = scores.masked_fill(taken.scatter_(1, chosen + 1, True)[:, 1:], -torch.inf).amax(1)
    margin = worst - rest
    return torch.where(margin.isfinite(), margin.clamp(max=65504), torch.nan).to(torch.float16)
