"""What a recorder holds until it sums up: the choices of passes, packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phatgoose.models.trace.choices import Tokens
from phatgoose.routers.context import Sequences


@dataclass(eq=False)
class TracedPass:
    """One pass of a stack as one or several modules saw it. Its tokens are worked out when they are needed."""

    sequences: Sequences
    rows: int
    length: int
    kept: Tensor | None
    first_input: int
    rows_per_input: int
    generated: bool
    whole: TracedPass | None = None
    """The pass with all of its tokens, where a module saw only those at `picked` (an expert of a mixture)."""
    picked: Tensor | None = None
    rejected: int = 0
    """How many of the last tokens were drafts that weren't accepted."""
    tokens: Tokens | None = None
    real: Tensor | None = None

    def read(self, random: torch.Generator) -> tuple[Tokens, Tensor]:
        """All tokens of the pass, and which of them are real: no padding, no rejected drafts."""
        if self.whole is not None and self.picked is not None:
            tokens, real = self.whole.read(random)
            return tokens[self.picked], real[self.picked]
        if self.tokens is None or self.real is None:
            aligned = self.sequences.aligned(self.rows, self.length, self.kept)
            rows = torch.arange(self.rows)[:, None].expand(-1, self.length).reshape(-1)
            self.real = aligned.real.reshape(-1).cpu()
            if self.rejected:
                length = self.sequences.positions.shape[1]
                accepted = torch.arange(length) < length - self.rejected
                accepted = accepted if self.kept is None else accepted[self.kept]
                self.real = self.real & accepted.repeat(self.rows)
            self.tokens = Tokens(
                rows,
                aligned.positions.reshape(-1).cpu().long(),
                self.first_input + rows // max(self.rows_per_input, 1),
                torch.full_like(rows, -1) if aligned.ids is None else aligned.ids.reshape(-1).cpu().long(),
                torch.full_like(self.real, self.generated),
                torch.rand(len(rows), generator=random, dtype=torch.float32),
            )
        return self.tokens, self.real


class Call(NamedTuple):  # made for every module and token: a dataclass would take thrice as long
    """One call of one module, as it was handed over."""

    path: str
    seen: TracedPass
    chosen: Tensor
    weights: Tensor
    margin: Tensor | None


class ChoiceBuffer:
    """Where a kernel writes the choices of modules that see the same tokens, one module after the other.

    chosen: int64 [M, N, k] and weights: float32 [M, N, k] on the CPU. paths: the modules whose choices are written,
    in order.
    """

    def __init__(self, seen: TracedPass, shape: torch.Size, modules: int, k: int):
        self.seen, self.shape, self.modules = seen, shape, modules
        self.chosen = torch.empty(modules, shape.numel(), k, dtype=torch.int64)
        self.weights = torch.empty(modules, shape.numel(), k, dtype=torch.float32)
        self.paths: dict[str, None] = {}
        self._starts = self.chosen.data_ptr(), self.weights.data_ptr()
        self._steps = tuple(x.stride(0) * x.element_size() for x in (self.chosen, self.weights))

    def fits(self, path: str, shape: torch.Size) -> bool:
        """Whether there is room for the choices of this module, whose output has this shape."""
        return shape[:-1] == self.shape and path not in self.paths and len(self.paths) < self.modules

    def next(self) -> tuple[int, int]:
        """Addresses of the next module's choices and weights."""
        i = len(self.paths)
        return self._starts[0] + i * self._steps[0], self._starts[1] + i * self._steps[1]

    def wrote(self, path: str) -> None:
        """The module at `path` has written to the addresses that `next` gave."""
        self.paths[path] = None


@dataclass(frozen=True, eq=False)
class Block:
    """The calls of M modules in one pass: chosen int16 and weights [M, N, k], margins [M, N] or None."""

    paths: tuple[str, ...]
    seen: TracedPass
    chosen: Tensor
    weights: Tensor
    margins: Tensor | None

    @property
    def kind(self) -> tuple[tuple[str, ...], int, bool]:
        return self.paths, self.chosen.shape[2], self.margins is not None


class PendingChoices:
    """The choices of the running pass, and blocks of those of passes that are over."""

    def __init__(self, weights: torch.dtype):
        self.weights = weights
        self.count = 0
        """Choices (tokens × modules × top-k) that are pending."""
        self.buffers: dict[tuple[str, int], ChoiceBuffer] = {}
        """Of the running pass, by whose tokens are read and top-k."""
        self._calls: list[Call] = []
        self._blocks: list[Block] = []

    def add(self, call: Call) -> None:
        """Takes in one module's call."""
        if any(call.path in buffer.paths for buffer in self.buffers.values()):
            self.pack()  # what the module chose before stays before this
        self._calls.append(call)
        self.count += call.chosen.numel()

    def pack(self) -> None:
        """Makes blocks of the calls so far: a few copies for all modules of a pass, instead of a few for each."""
        calls, self._calls = self._calls, []
        groups: dict[tuple[object, ...], list[Call]] = {}
        times: dict[tuple[str, int], int] = {}  # a module may run twice in a pass
        for call in calls:
            which = (call.path, id(call.seen))
            times[which] = times.get(which, 0) + 1
            key = (id(call.seen), call.chosen.shape[1], call.margin is None, call.chosen.device, times[which])
            groups.setdefault(key, []).append(call)
        for group in groups.values():
            margins = [call.margin for call in group if call.margin is not None]
            self._blocks.append(
                Block(
                    tuple(call.path for call in group),
                    group[0].seen,
                    torch.stack([call.chosen for call in group]).to(torch.int16),
                    torch.stack([call.weights for call in group]).to(self.weights),
                    torch.stack(margins) if margins else None,
                )
            )
        buffers, self.buffers = self.buffers, {}
        for buffer in buffers.values():
            n = len(buffer.paths)
            chosen, weights = buffer.chosen[:n].to(torch.int16), buffer.weights[:n].to(self.weights)
            self._blocks.append(Block(tuple(buffer.paths), buffer.seen, chosen, weights, None))
            self.count += chosen.numel()

    def take(self) -> Iterator[list[list[Block]]]:
        """Hands out all blocks: batches of chains, each the blocks of the same modules in one pass after the other.

        A chain's modules have all of their tokens in order. A module that stands in a block with others than before
        begins a new batch, since what it read earlier must be summed up earlier.
        """
        self.pack()
        blocks, self._blocks, self.count = self._blocks, [], 0
        chains: dict[object, list[Block]] = {}
        owner: dict[str, object] = {}
        for block in blocks:
            if any(owner.get(path, block.kind) != block.kind for path in block.paths):
                yield list(chains.values())
                chains, owner = {}, {}
            chains.setdefault(block.kind, []).append(block)
            owner.update(dict.fromkeys(block.paths, block.kind))
        yield list(chains.values())
