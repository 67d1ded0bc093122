"""Gate scores of inputs that several ranks hold a part of each, as tensor parallelism over a linear layer's input has it.

Of R ranks, rank r holds d/R entries u_r of every token's u, and the same entries v̄_r of every gate. The score needs u's mean and
deviation over all d entries. Sums over ranks of what each can compute are enough, so one all-reduce is. With m_r the mean of u_r,

    mean = Σ m_r / R        var = Σ (‖u_r − m_r‖² + d/R·(m_r − mean)²) / d
    score_e = Σ (v̄_{e,r}ᵀ(u_r − m_r) + (m_r − mean)·Σv̄_{e,r}) / (√(var + eps)·√d)

where nothing large is ever subtracted from something large, as Σu² − d·mean² would do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.ops.reference import EPS


def partial_scores(u: Tensor, gates: Tensor, rank: int, ranks: int) -> Tensor:
    """What rank `rank` has to say: the sum of this over all ranks is what `scores` takes.

    u: [N, d/R] raw, gates: standardised over all d, of which these [E, d/R] → float32 [N, E + 1 + R]: the products with the gates, the
    squares, and this rank's mean in a place of its own.
    """
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    mean = u.mean(-1, keepdim=True)
    centred = u - mean
    own = torch.zeros(ranks, dtype=u.dtype, device=u.device)
    own[rank] = 1
    return torch.cat([centred @ gates.to(u.dtype).T, centred.square().sum(-1, keepdim=True), mean * own], -1)


def scores(total: Tensor, sums: Tensor, d: int) -> Tensor:
    """score_e = v̄_eᵀū / √d of the whole input, float32 [N, E]. total: [N, E + 1 + R], summed over ranks; sums: Σv̄_{e,r} [R, E].

    Ranks that are given the same `total` choose the same experts, as they must.
    """
    ranks, experts = sums.shape
    products, squares, means = total.split([experts, 1, ranks], dim=-1)
    between = means - means.mean(-1, keepdim=True)
    variance = squares / d + between.square().mean(-1, keepdim=True)
    return (products + between @ sums) / ((variance + EPS).sqrt() * d**0.5)
