"""Routing at one linear layer of vLLM, as a module that torch.compile can trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phatgoose.ops.fast import choose, gate_scores
from phatgoose.ops.operators import routed_mix, routed_update
from phatgoose.ops.quantized_gates import kernel_gates
from phatgoose.ops.sharded import partial_scores, scores
from phatgoose.ops.stack import Stack
from phatgoose.ops.triton.backend import MOST_FUSED

AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shard:
    """The part of a module's input that this rank gets when tensor parallelism splits it."""

    rank: int
    ranks: int
    columns: range
    d_in: int
    """Of the whole module."""
    all_reduce: AllReduce
    """A tensor → its sum over all ranks."""


class StackSlice(nn.Module):
    """The experts' updates at one module of the pool, for the part of its output that a rank holds.

    Args:
        stack: as the rank holds it: A [R, inputs it gets], B [R, outputs it has].
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    scales: Tensor

    def __init__(self, stack: Stack, device: torch.device):
        super().__init__()
        # 0 asks for the CPU kernel, which has no use for it.
        self.widest = 0 if device.type == "cpu" else max(stack.ranks)
        tensors = {
            "a": stack.A,
            "b": stack.B,
            "owners": torch.tensor([stack.starts, stack.ranks], dtype=torch.int32),
            "scales": torch.tensor(stack.scales, dtype=torch.float32),
        }
        self.keep(tensors, device)

    def keep(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        for name, value in tensors.items():
            self.register_buffer(name, value.detach().contiguous().to(device), persistent=False)

    def rows(self) -> list[Tensor]:
        """As the operators take them."""
        return [self.a, self.b, self.owners, self.scales]


class RoutedSlice(StackSlice):
    """Adds Σ w Δ(u) of one module of the pool to the part of its output that a rank holds.

    Args:
        gates: standardised, float32 [E, d_in], of the whole input.
        stack: as `StackSlice`.
        shard: None if the rank gets the whole input.
    """

    gates: Tensor
    sums: Tensor

    def __init__(self, gates: Tensor, top_k: int, stack: Stack, device: torch.device, shard: Shard | None):
        super().__init__(stack, device)
        self.top_k, self.shard = min(top_k, stack.experts), shard
        self.fused = shard is None and (device.type == "cpu" or self.top_k <= MOST_FUSED)
        tensors = {"gates": gates}
        self.gate_names = ["gates"]
        if shard is not None:
            tensors["gates"] = gates[:, shard.columns.start : shard.columns.stop]
            tensors["sums"] = gates.double().reshape(len(gates), shard.ranks, -1).sum(-1).T.float()
        elif device.type == "cpu":
            self.gate_names += ["codes", "facts"]
            tensors.update(zip(self.gate_names, kernel_gates(gates.contiguous()), strict=True))
        self.keep(tensors, device)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """y + Σ w Δ(u), a new tensor. u: [N, inputs this rank gets], y: [N, outputs it has].

        If the input is split, y is the rank's term of a sum over ranks, and so is the update.
        """
        rows = self.rows()
        if self.fused:
            gates = [getattr(self, name) for name in self.gate_names]
            return routed_update(u, y, gates, rows, self.top_k, self.widest)
        chosen, weights = choose(self._scores(u), self.top_k)
        return routed_mix(u, y, chosen, weights, rows, self.widest)

    def _scores(self, u: Tensor) -> Tensor:
        """Scores of the whole input, float32 [N, E], the same on every rank."""
        if (shard := self.shard) is None:
            return gate_scores(u, self.gates)
        total = shard.all_reduce(partial_scores(u, self.gates, shard.rank, shard.ranks))
        return scores(total, self.sums, shard.d_in)


class RoutedLinear(nn.Module):
    """The routed modules in one layer, each with its own columns of the layer's output."""

    def __init__(self, parts: Sequence[tuple[int, int, StackSlice]]):
        super().__init__()
        self.places = tuple((begin, end) for begin, end, _ in parts)
        self.parts = nn.ModuleList(part for _, _, part in parts)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """y [..., outputs] with the update of every routed module, for u [..., inputs] of the layer on this rank."""
        flat_u, flat_y = u.reshape(-1, u.shape[-1]), y.reshape(-1, y.shape[-1])
        pieces, done = [], 0
        for (begin, end), part in zip(self.places, self.parts, strict=True):
            if done < begin:
                pieces.append(flat_y[:, done:begin])
            pieces.append(part(flat_u, flat_y[:, begin:end]))
            done = end
        if done < flat_y.shape[-1]:
            pieces.append(flat_y[:, done:])
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)).reshape(y.shape)
