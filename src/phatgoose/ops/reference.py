"""Score, choose and mix written as plainly as in the paper: the oracle of every backend.

Slow. N tokens, E experts, k choices per token. Computes in float32, or in float64 if its inputs
are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.ops.stack import VECTOR_TERMS, Layer, Stack

EPS = 1e-5


def standardise(x: Tensor) -> Tensor:
    """(x − mean)/√(var + 1e-5) over the last dimension, with the biased variance: LayerNorm without affine."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def gate_scores(u: Tensor, gates: Tensor) -> Tensor:
    """score_e = v̄_eᵀ ū / √d (paper, section 3.2). u: raw inputs [N, d], gates: standardised v̄ [E, d] → [N, E]."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, gates.dtype), torch.float32)
    norm: float = u.shape[-1] ** 0.5
    return standardise(u).to(dtype) @ gates.to(dtype).T / norm


def choose(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of every token and the softmax over their scores: [N, E] → int64 [N, k], float [N, k].

    k is cut to E. Equal scores: the lower index first.
    """
    order = scores.sort(dim=-1, descending=True, stable=True)
    k = min(top_k, scores.shape[-1])
    return order.indices[:, :k], order.values[:, :k].softmax(-1)


def mix(
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None = None
) -> Tensor:
    """y + Σ_j w_j Δ_{e_j}(u). u: [N, d_in] (ids [N] at an embedding), y: [N, d_out], chosen and weights: [N,
    k] → y's shape and dtype.

    A negative index chooses nothing. `layer` is needed where an expert scales W u without the bias, or u.
    """
    dtype = torch.promote_types(torch.promote_types(y.dtype, stack.A.dtype), torch.float32)
    own, total = y.to(dtype), torch.zeros(y.shape, dtype=dtype, device=y.device)
    for expert in range(stack.experts):
        weight = torch.where(chosen == expert, weights, 0).sum(-1, keepdim=True).to(dtype)  # [N, 1]
        total = total + weight * _delta(u, own, stack, expert, layer)
    return (own + total).to(y.dtype)


def _delta(u: Tensor, y: Tensor, stack: Stack, expert: int, layer: Layer | None) -> Tensor:
    """Δ_e(u) = scale·B A u + its vectors' terms (`stack.VECTOR_TERMS`) + bottleneck(y), one by one: [N, d_out]
    in y's dtype."""
    a, b = stack.A[stack.rows(expert)].to(y.dtype), stack.B[stack.rows(expert)].to(y.dtype)
    delta = (a[:, u].T if stack.embedding else u.to(y.dtype) @ a.T) @ b * stack.scales[expert]
    for name, vectors in stack.vectors.items():
        for owner, values in zip(vectors.experts.tolist(), vectors.values, strict=True):
            if owner == expert:
                delta = delta + VECTOR_TERMS[name](values.to(y.dtype), u, y, layer)
    for owner, bottleneck in stack.bottlenecks:
        if owner == expert:
            delta = delta + bottleneck.apply(y, stack.residual).to(y.dtype)
    return delta
