"""All experts' updates at one module, side by side, as every backend takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops.bottleneck import Bottleneck, Residual
from phatgoose.ops.update import LOW_RANK_FIELDS, Update


@dataclass(frozen=True, eq=False)
class Layer:
    """What updates may need of the module itself: its bias b [d_out] or None, and x → W x, [N, d_in] → [N, d_out]."""

    bias: Tensor | None
    product: Callable[[Tensor], Tensor]


VectorTerm = Callable[[Tensor, Tensor, Tensor, Layer | None], Tensor]
"""(v, u, y [N, d_out], layer) → what the vectors v, one per token or one for all, add to y, in its dtype."""


def _linear_scale(v: Tensor, u: Tensor, y: Tensor, layer: Layer | None) -> Tensor:
    assert layer is not None
    return v * (y if layer.bias is None else y - layer.bias.to(y.dtype))


def _input_scale(v: Tensor, u: Tensor, y: Tensor, layer: Layer | None) -> Tensor:
    assert layer is not None
    return layer.product((v * u.to(y.dtype)).to(u.dtype)).to(y.dtype)


VECTOR_TERMS: dict[str, VectorTerm] = {
    "bias": lambda v, u, y, layer: v,
    "output_scale": lambda v, u, y, layer: v * y,
    "linear_scale": _linear_scale,
    "input_scale": _input_scale,
}
"""The terms of Δ(u) that a vector per expert makes, by the names that `Update.vectors` gives. Each is linear
in its vectors, so a weighted sum of experts needs it once. They are added in this order."""


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

    The low-rank rows of all experts share two matrices, A: [R, d_in] and B: [R, d_out] (B transposed). Expert e owns
    ranks[e] rows from starts[e] and multiplies them by scales[e]. Ranks may differ. Rank 0 means no low-rank
    part, and an expert without any part is the null candidate. Rows that nobody owns are allowed and never used.
    """

    A: Tensor
    B: Tensor
    starts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    """By the names of VECTOR_TERMS, in their order; terms that no expert has are absent."""
    bottlenecks: tuple[tuple[int, Bottleneck], ...] = ()
    """(expert, its bottleneck adapter)."""
    residual: Residual | None = None
    """Where bottleneck adapters find h; None if none reads it. Whoever runs the module fills it."""
    embedding: bool = False
    """Whether u are token ids, int64 [N], and A u are columns of A."""
    prefetch: bool = False
    """Whether A and B are mapped from a file that memory may not hold: rows are best asked for before they are read."""

    @property
    def experts(self) -> int:
        return len(self.ranks)

    @property
    def low_rank_only(self) -> bool:
        """Whether no expert has anything but low-rank rows."""
        return not any(getattr(self, name) for name in _OTHER_PARTS)

    @property
    def has_gaps(self) -> bool:
        """Whether there are rows that nobody owns."""
        return sum(self.ranks) < self.A.shape[0]

    def rows(self, expert: int) -> slice:
        return slice(self.starts[expert], self.starts[expert] + self.ranks[expert])

    def other_tensors(self) -> Iterator[Tensor]:
        """Every tensor but A and B."""
        for vectors in self.vectors.values():
            yield from (vectors.experts, vectors.values)
        for _, bottleneck in self.bottlenecks:
            yield from bottleneck.tensors().values()

    def hidden(self, u: Tensor, rows: slice = slice(None)) -> Tensor:
        """A u of these rows: [N, d_in] (ids [N] for an embedding) → [N, rows]."""
        a = self.A[rows]
        return a[:, u].T if self.embedding else u.to(a.dtype) @ a.T

    def per_row(self, values: Tensor) -> Tensor:
        """One value per expert → one per row of A and B: [N, E] → [N, R]; rows that nobody owns get 0."""
        index, owned = self._owners(values.device)
        spread = values[:, index]
        return spread if owned is None else spread * owned

    # What is derived from a stack is kept in its __dict__, and made anew where the stack was moved. `replace` drops it.

    def _owners(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Which expert owns each row, and which rows have an owner (None: all)."""
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
        """The stack on this device: itself, if it is there."""
        if self.A.device == device:
            return self
        return replace(
            self,
            A=self.A.to(device),
            B=self.B.to(device),
            vectors={n: Vectors(v.experts.to(device), v.values.to(device)) for n, v in self.vectors.items()},
            bottlenecks=tuple((expert, bottleneck.to(device)) for expert, bottleneck in self.bottlenecks),
            prefetch=False,
        )


_LOW_RANK_PARTS = {"A", "B", "starts", "ranks", "scales", "residual", "embedding", "prefetch"}
_OTHER_PARTS = tuple(part.name for part in fields(Stack) if part.name not in _LOW_RANK_PARTS)
"""Fields of a stack that add something to its low-rank rows, where they aren't empty."""
STACKED_FIELDS = LOW_RANK_FIELDS | {"bias", "output_scale", "input_scale", "bottleneck", "embedding"}
"""The fields of an update that `make_stack` takes, besides A and B."""


def make_stack(
    updates: Sequence[Update | None],
    d_in: int,
    d_out: int,
    dtype: torch.dtype,
    rows: tuple[Tensor, Tensor, Sequence[int]] | None = None,
    residual: Residual | None = None,
) -> Stack:
    """Stacks one update per expert, in order; None is the null candidate.

    Args:
        dtype: of A and B: the dtype the module computes in. Vectors are kept in float32 or wider, whatever it is.
        rows: A [R, d_in], B transposed [R, d_out], both in `dtype`, and where each update's rows begin, if all
            of them stand side by side already. Nothing is copied then.
        residual: where bottleneck adapters read the residual stream; None: a new place.

    Raises:
        RoutingError: an update has a part that isn't one of `STACKED_FIELDS`: DoRA that isn't `resolved`, VeRA that
            isn't `placed`, or a new field that has no term here.
    """
    present = [(e, update) for e, update in enumerate(updates) if update is not None]
    if unknown := set().union(*(update.fields_set() for _, update in present)) - STACKED_FIELDS:
        raise RoutingError(f"an update can't be stacked with its {', '.join(sorted(unknown))}.")
    ranks = tuple(0 if update is None else update.rank for update in updates)
    if rows is None:
        low = [update for _, update in present if update.rank]
        a = torch.cat([torch.empty(0, d_in, dtype=dtype), *(update.A.detach().to(dtype) for update in low)])
        b = torch.cat(
            [torch.empty(0, d_out, dtype=dtype), *(update.B.detach().T.to(dtype) for update in low)]
        )
        rows = a, b, tuple(accumulate(ranks, initial=0))[:-1]
    bottlenecks = [(e, update.bottleneck) for e, update in present if update.bottleneck is not None]
    reads_residual = any(bottleneck.residual is not None for _, bottleneck in bottlenecks)
    return Stack(
        A=rows[0],
        B=rows[1],
        starts=tuple(rows[2]),
        ranks=ranks,
        scales=tuple(1.0 if update is None else float(update.scale) for update in updates),
        vectors=_stacked_vectors(present, torch.promote_types(dtype, torch.float32)),
        bottlenecks=tuple((e, bottleneck.detached(dtype)) for e, bottleneck in bottlenecks),
        residual=(residual or Residual()) if reads_residual else None,
        embedding=any(update.embedding for _, update in present),
    )


def _stacked_vectors(present: Sequence[tuple[int, Update]], dtype: torch.dtype) -> dict[str, Vectors]:
    of_experts = [(e, update.vectors(dtype)) for e, update in present]
    stacked = {}
    for name in VECTOR_TERMS:
        if owners := [e for e, vectors in of_experts if name in vectors]:
            rows = [vectors[name].cpu().reshape(-1) for _, vectors in of_experts if name in vectors]
            stacked[name] = Vectors(torch.tensor(owners), torch.stack(rows))
    return stacked
