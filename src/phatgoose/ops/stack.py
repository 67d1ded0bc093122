"""All experts' updates at one module, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from phatgoose.ops.bottleneck import Branch, Narrow, Residual, branch
from phatgoose.ops.bottleneck import narrow as narrow  # backends have it from here


class Part(Protocol):
    """One expert's update at the module: Δ(u) = scale·(B A u + bias) + (c−1) ⊙ y + W((l−1) ⊙ u) + bottleneck(y)."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def output_scale(self) -> Tensor | None: ...
    @property
    def covers_bias(self) -> bool: ...
    @property
    def input_scale(self) -> Tensor | None: ...
    @property
    def bottleneck(self) -> Narrow | None: ...
    @property
    def embedding(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class Layer:
    """What updates may need of the module itself: its bias b [d_out] or None, and x → W x, [N, d_in] → [N, d_out]."""

    bias: Tensor | None
    product: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Vectors:
    """One vector for each of the n experts that have one. experts: int64 [n]; values: float32 [n, d] or wider."""

    experts: Tensor
    values: Tensor

    def sum(self, per_expert: Tensor) -> Tensor:
        """Σ_e w_e value_e: [N, E] → [N, d] in the values' dtype."""
        return per_expert[:, self.experts].to(self.values.dtype) @ self.values


@dataclass(frozen=True, eq=False)
class Stack:
    """The updates of E experts at one module.

    The low-rank rows of all experts share two matrices, A: [R, d_in] and B: [R, d_out] (B transposed); expert e owns
    ranks[e] rows from starts[e] and multiplies them by scales[e]. Ranks differ freely; rank 0 is no low-rank part, and an expert
    without any part is the null candidate. Rows that nobody owns are allowed and never used.
    """

    A: Tensor
    B: Tensor
    starts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    bias: Vectors | None = None
    """scale · bias, added as it is."""
    output_scale: Vectors | None = None
    """c − 1, times W u + b."""
    linear_scale: Vectors | None = None
    """c − 1, times W u."""
    input_scale: Vectors | None = None
    """l − 1, times u, before W."""
    bottlenecks: tuple[tuple[int, Branch], ...] = ()
    """(expert, its bottleneck adapter)."""
    residual: Residual | None = None
    """Where bottleneck adapters look for h; None if none reads it. Whoever runs the module fills it."""
    embedding: bool = False
    """Whether u are token ids, int64 [N], and A u are columns of A."""
    ahead: bool = False
    """Whether A and B stand in a file that memory may not hold, so that rows are best asked for before they are read."""

    @property
    def experts(self) -> int:
        return len(self.ranks)

    @property
    def low_rank_only(self) -> bool:
        """Whether no expert has anything but low-rank rows."""
        vectors = (self.bias, self.output_scale, self.linear_scale, self.input_scale)
        return not self.bottlenecks and all(v is None for v in vectors)

    @property
    def has_gaps(self) -> bool:
        """Whether there are rows that nobody owns."""
        return sum(self.ranks) < self.A.shape[0]

    def rows(self, expert: int) -> slice:
        return slice(self.starts[expert], self.starts[expert] + self.ranks[expert])

    def hidden(self, u: Tensor, rows: slice = slice(None)) -> Tensor:
        """A u of these rows: [N, d_in] (ids [N] for an embedding) → [N, rows]."""
        a = self.A[rows]
        return a[:, u].T if self.embedding else u.to(a.dtype) @ a.T

    def per_row(self, values: Tensor) -> Tensor:
        """One value per expert → one per row of A and B: [N, E] → [N, R]; rows that nobody owns get 0."""
        index, owned = self._owners(values.device)
        spread = values[:, index]
        return spread if owned is None else spread * owned

    def _owners(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if (known := self.__dict__.get("_known_owners")) is None or known[0].device != device:
            owner = torch.full((self.A.shape[0],), -1, dtype=torch.int64)
            for expert in range(self.experts):
                owner[self.rows(expert)] = expert
            owned = None if bool((owner >= 0).all()) else (owner >= 0).to(device)
            known = (owner.clamp(min=0).to(device), owned)
            self.__dict__["_known_owners"] = known
        return known

    def scale_vector(self, device: torch.device) -> Tensor:
        """scales as a float32 tensor [E]."""
        if (known := self.__dict__.get("_known_scales")) is None or known.device != device:
            known = torch.tensor(self.scales, dtype=torch.float32, device=device)
            self.__dict__["_known_scales"] = known
        return known

    def start_vector(self, device: torch.device) -> Tensor:
        """starts as an int64 tensor [E]."""
        if (known := self.__dict__.get("_known_starts")) is None or known.device != device:
            known = torch.tensor(self.starts, device=device)
            self.__dict__["_known_starts"] = known
        return known

    def to(self, device: torch.device) -> Stack:
        """Itself, if it is there."""
        if self.A.device == device:
            return self

        def moved(v: Vectors | None) -> Vectors | None:
            return None if v is None else Vectors(v.experts.to(device), v.values.to(device))

        return replace(
            self,
            A=self.A.to(device),
            B=self.B.to(device),
            bias=moved(self.bias),
            output_scale=moved(self.output_scale),
            linear_scale=moved(self.linear_scale),
            input_scale=moved(self.input_scale),
            bottlenecks=tuple((e, b.to(device)) for e, b in self.bottlenecks),
            ahead=False,
        )


def make_stack(
    parts: Sequence[Part | None],
    d_in: int,
    d_out: int,
    dtype: torch.dtype,
    rows: tuple[Tensor, Tensor, Sequence[int]] | None = None,
    residual: Residual | None = None,
) -> Stack:
    """Stacks one update per expert, in order; None is the null candidate.

    `dtype` is that of A and B: the dtype the module computes in. Vectors are kept in float32 or wider, whatever it is.
    `rows`: A [R, d_in] and B transposed [R, d_out] of all parts in this dtype and where each part begins, if they stand side by
    side already: then nothing of them is copied. `residual`: where bottleneck adapters read the residual stream; None: a new place.
    """
    wide = torch.promote_types(dtype, torch.float32)
    present = [(e, p) for e, p in enumerate(parts) if p is not None]
    low = [p for _, p in present if p.A.shape[0]]
    ranks = tuple(0 if p is None else p.A.shape[0] for p in parts)

    def vectors(found: list[tuple[int, Tensor]]) -> Vectors | None:
        if not found:
            return None
        rows = torch.stack([v.detach().to("cpu", wide).reshape(-1) for _, v in found])
        return Vectors(torch.tensor([e for e, _ in found]), rows)

    narrows = [(e, p.bottleneck) for e, p in present if p.bottleneck is not None]
    reads = any(b.residual is not None for _, b in narrows)
    residual = (residual or Residual()) if reads else None
    if rows is None:
        a = torch.cat([torch.empty(0, d_in, dtype=dtype), *(p.A.detach().to(dtype) for p in low)])
        b = torch.cat([torch.empty(0, d_out, dtype=dtype), *(p.B.detach().T.to(dtype) for p in low)])
        rows = a, b, tuple(accumulate(ranks, initial=0))[:-1]
    scaled = [(e, p.output_scale.to(wide) - 1, p) for e, p in present if p.output_scale is not None]
    return Stack(
        A=rows[0],
        B=rows[1],
        starts=tuple(rows[2]),
        ranks=ranks,
        scales=tuple(1.0 if p is None else float(p.scale) for p in parts),
        bias=vectors([(e, p.bias.to(wide) * p.scale) for e, p in present if p.bias is not None]),
        output_scale=vectors([(e, c) for e, c, p in scaled if p.covers_bias]),
        linear_scale=vectors([(e, c) for e, c, p in scaled if not p.covers_bias]),
        input_scale=vectors([(e, p.input_scale.to(wide) - 1) for e, p in present if p.input_scale is not None]),
        bottlenecks=tuple((e, branch(b, residual, dtype)) for e, b in narrows),
        residual=residual,
        embedding=any(p.embedding for _, p in present),
    )  # fmt: skip
