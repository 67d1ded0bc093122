"""Gate scores of inputs that are split over ranks, as in tensor parallelism over a layer's input.

Of R ranks, rank r holds d/R entries u_r of every token's u, and the same entries v̄_r of every gate. The score
needs u's mean and deviation over all d entries. Both follow from sums of what each rank can compute, so one
all-reduce is enough. With m_r the mean of u_r,

    mean = Σ m_r / R        var = Σ (‖u_r − m_r‖² + d/R·(m_r − mean)²) / d
    score_e = Σ (v̄_{e,r}ᵀ(u_r − m_r) + (m_r − mean)·Σv̄_{e,r}) / (√(var + eps)·√d)

This never subtracts two large numbers, as Σu² − d·mean² would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.ops.reference import EPS


def partial_scores(u: Tensor, gates: Tensor, rank: int, ranks: int) -> Tensor:
    """What rank `rank` contributes: the sum of this over all ranks is what `scores` takes.

    u: [N, d/R] raw; gates: [E, d/R] of gates that were standardised over all d → float32 [N, E + 1 + R]: the
    products with the gates, the squares, and this rank's mean in its own column of R.
    """
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    mean = u.mean(-1, keepdim=True)
    centred = u - mean
    own = torch.zeros(ranks, dtype=u.dtype, device=u.device)
    own[rank] = 1
    return torch.cat([centred @ gates.to(u.dtype).T, centred.square().sum(-1, keepdim=True), mean * own], -1)


def scores(total: Tensor, sums: Tensor, d: int) -> Tensor:
    """score_e = v̄_eᵀū / √d of the whole input, float32 [N, E]. total: [N, E + 1 + R], summed over ranks;
    sums: Σv̄_{e,r} [R, E].

    All ranks are given the same `total`, so they choose the same experts, as they must.
    """
    ranks, experts = sums.shape
    parts: tuple[Tensor, ...] = total.split([experts, 1, ranks], dim=-1)
    products, squares, means = parts
    between = means - means.mean(-1, keepdim=True)
    variance = squares / d + between.square().mean(-1, keepdim=True)
    norm: float = d**0.5
    return (products + between @ sums) / ((variance + EPS).sqrt() * norm)
