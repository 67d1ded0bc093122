"""Which modules of a pool a linear layer of vLLM holds, and which of their rows and columns.

vLLM merges q, k, v and gate, up, and gives each rank of tensor parallelism a part. Sizes only, no tensors, no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phatgoose.errors import RoutingError


@dataclass(frozen=True)
class Linear:
    """What a linear layer of vLLM says of itself, on one rank."""

    path: str
    """Its name in vLLM's model, such as model.layers.0.self_attn.qkv_proj."""
    d_in: int
    """Inputs of the whole layer."""
    rank: int
    ranks: int
    """The number of ranks of tensor parallelism; 1 if this layer isn't split."""
    held_in: int
    """How many of the d_in inputs this rank gets: fewer if the layer is split over its input (row-parallel)."""
    held_out: tuple[int, ...]
    """How many rows of each matrix that is merged in the layer this rank holds."""
    replicas: tuple[int, ...]
    """How many successive ranks hold the same rows of each merged matrix: more than 1 if there are fewer keys
    than ranks."""

    @property
    def splits_input(self) -> bool:
        return self.held_in < self.d_in


@dataclass(frozen=True)
class Slice:
    """One module of the pool within a merged layer, as one rank holds it."""

    path: str
    """The module's, as experts name it."""
    begin: int
    end: int
    """Its columns of the layer's output on this rank."""
    rows: tuple[range, ...]
    """The outputs of the module that these columns are, in order."""
    d_out: int
    """How many outputs the whole module has."""


def columns(linear: Linear) -> range:
    """Which of the layer's inputs this rank gets."""
    start = linear.rank * linear.held_in if linear.splits_input else 0
    return range(start, start + linear.held_in)


def modules_in(linear: Linear, merged: Mapping[str, Sequence[str]]) -> list[str]:
    """The paths of the modules in a layer, as vLLM would name them if it didn't merge them; `merged` as for
    `slices`."""
    before, dot, last = linear.path.rpartition(".")
    return [f"{before}{dot}{name}" for name in merged.get(last, [last])]


def slices(linear: Linear, merged: Mapping[str, Sequence[str]]) -> list[Slice]:
    """The modules that a layer holds, in the order of its output.

    Args:
        merged: vLLM's packed_modules_mapping: the last part of a merged layer's name → those of the modules in it.

    Raises:
        RoutingError: the layer has another number of matrices than `merged` names modules.
    """
    names = modules_in(linear, merged)
    parts = [
        _rows_held(linear, size, copies)
        for size, copies in zip(linear.held_out, linear.replicas, strict=True)
    ]
    if len(names) == 1:  # one module, of which the layer may still hold several parts, split one by one
        rows, d_out = [], 0
        for held, size in parts:
            rows.append(range(d_out + held.start, d_out + held.stop))
            d_out += size
        return [Slice(names[0], 0, sum(linear.held_out), tuple(rows), d_out)]
    if len(names) != len(parts):
        raise RoutingError(
            f"vLLM's {linear.path} is merged of {', '.join(name.rpartition('.')[2] for name in names)}, but "
            f"in {len(parts)} parts, so it isn't known which part belongs to which module. This architecture "
            "can't be routed."
        )
    found, begin = [], 0
    for name, (held, size) in zip(names, parts, strict=True):
        found.append(Slice(name, begin, begin + len(held), (held,), size))
        begin += len(held)
    return found


def _rows_held(linear: Linear, size: int, copies: int) -> tuple[range, int]:
    """The rows of a merged matrix that this rank holds, and how many rows it has in all."""
    if linear.splits_input or linear.ranks == 1:
        return range(size), size
    start = linear.rank // copies * size
    return range(start, start + size), linear.ranks // copies * size
