"""What was recorded at one module: choices (`Choices`), or their sums (`Load`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """N real tokens, in the order they were read.

    rows, positions: int64 [N], the row of the batch and the place in the sequence. inputs: int64 [N], which sequence
    of the whole trace (beams of one input share its number). ids: int64 [N], −1 where the model was given embeddings.
    generated: bool [N], True for a token read behind a key-value cache. draws: float32 [N] in [0, 1), what sampling
    goes by.
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
    """The parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(*(torch.cat([getattr(part, name) for part in parts]) for name in TOKEN_FIELDS))


@dataclass(frozen=True, eq=False)
class Choices:
    """The choices of one module on N real tokens (padding left out), k each.

    experts: int16 [N, k], indices into Trace.experts, best first (−1: none). weights: float16 [N, k]. margins:
    float16 [N], the k-th best score minus the next one, NaN where there is no next; None if the router compares no
    scores or they weren't asked for.
    """

    path: str
    experts: Tensor
    weights: Tensor
    tokens: Tokens
    margins: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return self.tokens.rows

    @property
    def positions(self) -> Tensor:
        return self.tokens.positions

    @property
    def ids(self) -> Tensor:
        return self.tokens.ids

    def __getitem__(self, keep: Tensor) -> Choices:
        margins = None if self.margins is None else self.margins[keep]
        return Choices(self.path, self.experts[keep], self.weights[keep], self.tokens[keep], margins)


@dataclass(frozen=True, eq=False)
class Load:
    """Sums over one module's tokens, of the prompt ([0]) and read behind a cache ([1]); the last expert is "none".

    weight: float64 [2, E+1], summed weights. acted and first: int64 [2, E+1], on how many tokens an expert was among
    the chosen, and was the one with most weight. tokens: int64 [2].
    """

    weight: Tensor
    acted: Tensor
    first: Tensor
    tokens: Tensor

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, n) + getattr(other, n) for n in ("weight", "acted", "first", "tokens")))


def load_of(c: Choices, experts: int) -> Load:
    """The sums of one module's choices."""
    return loads_of(c.tokens, c.experts[None], c.weights[None], experts)[0]


def loads_of(tokens: Tokens, chosen: Tensor, weights: Tensor, experts: int) -> list[Load]:
    """The sums of the choices of M modules on the same tokens; chosen (−1: none) and weights: [M, N, k]."""
    m, _, k = chosen.shape
    part, size = tokens.generated.long(), experts + 1
    index = torch.where(chosen >= 0, chosen.long(), experts) + part[:, None] * size
    index += (torch.arange(m) * 2 * size)[:, None, None]
    acted = torch.zeros(m * 2 * size, dtype=torch.int64)
    weight = torch.zeros(m * 2 * size, dtype=torch.float64)
    weight.index_add_(0, index.reshape(-1), weights.double().reshape(-1))
    acted.index_add_(0, index.reshape(-1), torch.ones_like(index).reshape(-1))
    first = torch.zeros_like(acted)
    if k:
        best = index.gather(2, weights.argmax(2, keepdim=True)).reshape(-1)
        first.index_add_(0, best, torch.ones_like(best))
    counts = torch.bincount(part, minlength=2)
    sums = (x.view(m, 2, size) for x in (weight, acted, first))
    return [Load(w, a, f, counts) for w, a, f in zip(*sums, strict=True)]


def merged(parts: list[Choices], tokens: Tokens | None = None) -> Choices:
    """The parts as one, in this order. tokens: those of all parts, if they are joined already."""
    if len(parts) == 1:
        return parts[0]
    margins = [p.margins for p in parts if p.margins is not None]
    k = max(p.experts.shape[1] for p in parts)

    def wide(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, k - values.shape[1]), value=fill)

    return Choices(
        parts[0].path,
        torch.cat([wide(p.experts, -1) for p in parts]),
        torch.cat([wide(p.weights, 0) for p in parts]),
        joined([p.tokens for p in parts]) if tokens is None else tokens,
        torch.cat(margins) if len(margins) == len(parts) else None,
    )
