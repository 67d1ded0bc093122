"""Routing at one module, written as plainly as the paper has it. Slow; every other backend is held to it.

N tokens, E experts, k choices per token. Computes in float32, or in float64 if its inputs are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.ops.stack import Stack

EPS = 1e-5


def standardise(x: Tensor) -> Tensor:
    """(x − mean)/√(var + 1e-5) over the last dimension, biased variance: LayerNorm without affine. [..., d] → [..., d]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def gate_scores(u: Tensor, gates: Tensor) -> Tensor:
    """score_e = v̄_eᵀ ū / √d. u: [N, d] raw inputs, gates: [E, d] standardised vectors v̄ → [N, E] (paper, section 3.2)."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, gates.dtype), torch.float32)
    return standardise(u).to(dtype) @ gates.to(dtype).T / u.shape[-1] ** 0.5


def choose(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of every token and the softmax over their scores: [N, E] → int64 [N, k], float [N, k].

    k is cut to E. Equal scores: the lower index first.
    """
    order = scores.sort(dim=-1, descending=True, stable=True)
    k = min(top_k, scores.shape[-1])
    return order.indices[:, :k], order.values[:, :k].softmax(-1)


def mix(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """y + Σ_j w_j Δ_{e_j}(u). u: [N, d_in], y: [N, d_out], chosen and weights: [N, k] → [N, d_out] in y's dtype.

    A negative index chooses nothing.
    """
    dtype = torch.promote_types(torch.promote_types(u.dtype, stack.A.dtype), torch.float32)
    total = torch.zeros(y.shape, dtype=dtype, device=y.device)
    for expert in range(stack.experts):
        weight = torch.where(chosen == expert, weights, 0).sum(-1, keepdim=True).to(dtype)  # [N, 1]
        rows = stack.rows(expert)
        total = total + weight * ((u.to(dtype) @ stack.A[rows].to(dtype).T) @ stack.B[rows].to(dtype))
    return (y.to(torch.promote_types(y.dtype, dtype)) + total).to(y.dtype)
