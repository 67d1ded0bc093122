"""Routing at one module with batched torch operations. Same signatures and results as `phatgoose.ops.reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.ops.reference import EPS
from phatgoose.ops.stack import Layer, Stack, narrow

# Measured by benchmarks/ops.py on two CPU cores (bf16, 576 → 1536): up to DENSE_ROWS stacked rows one product over all
# experts is cheapest for any number of tokens; above it, up to GATHER_TOKENS tokens gather their own rows.
DENSE_ROWS = 1024
GATHER_TOKENS = 8


def gate_scores(u: Tensor, gates: Tensor) -> Tensor:
    """score_e = v̄_eᵀ ū / √d in float32 (float64 if u is). u: [N, d], gates: standardised [E, d] → [N, E]."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    return F.layer_norm(u, u.shape[-1:], eps=EPS) @ (gates.to(u.dtype) / u.shape[-1] ** 0.5).T


def choose(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of every token and the softmax over their scores. Which of two equal scores comes first is open."""
    values, chosen = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    return chosen, values.softmax(-1)


def mix(
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None = None
) -> Tensor:
    """y + Σ_j w_j Δ_{e_j}(u), by whichever of three ways is cheapest for this many tokens and stacked rows."""
    if chosen.numel() == 0:
        return y
    added = y if stack.A.shape[0] == 0 else _low_rank(u, y, stack, chosen, weights)
    if stack.low_rank_only:
        return added
    return (added + _others(u, y, stack, chosen, weights, layer)).to(y.dtype)


def _low_rank(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    if (
        stack.A.shape[0] <= DENSE_ROWS and not stack.has_gaps
    ):  # rows that nobody owns may hold anything, NaN too
        return _dense(u, y, stack, chosen, weights)
    if u.shape[0] <= GATHER_TOKENS and len(set(stack.ranks)) == 1 and not stack.embedding:
        return _gather(u, y, stack, chosen, weights)
    return _grouped(u, y, stack, chosen, weights)


def _others(
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None
) -> Tensor:
    """Everything but the low-rank parts: [N, d_out] in float32 or wider. W runs once, whatever number of experts scale its input."""
    per_expert = _per_expert(stack, chosen, weights)
    own = y.to(torch.promote_types(y.dtype, torch.float32))
    total = torch.zeros_like(own)
    if stack.bias is not None:
        total = total + stack.bias.sum(per_expert)
    if stack.output_scale is not None:
        total = total + stack.output_scale.sum(per_expert) * own
    if stack.linear_scale is not None:
        assert layer is not None
        product = own if layer.bias is None else own - layer.bias.to(own.dtype)
        total = total + stack.linear_scale.sum(per_expert) * product
    if stack.input_scale is not None:
        assert layer is not None
        scaled = (stack.input_scale.sum(per_expert) * u.to(own.dtype)).to(u.dtype)
        total = total + layer.product(scaled).to(own.dtype)
    for expert, bottleneck in stack.bottlenecks:
        weight = per_expert[:, expert, None].to(own.dtype)
        if bool((weight != 0).any()):
            total = total + weight * narrow(y, bottleneck).to(own.dtype)
    return total


def _per_expert(stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each expert's weight for each token: [N, k] → [N, E]."""
    per_expert = weights.new_zeros((chosen.shape[0], stack.experts))
    return per_expert.scatter_add(1, chosen.clamp(min=0), torch.where(chosen >= 0, weights, 0))


def _scaled(stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """weights times their experts' scales, 0 where nothing is chosen: [N, k]."""
    scales = stack.scale_vector(weights.device).to(weights.dtype)
    return torch.where(chosen >= 0, weights * scales[chosen.clamp(min=0)], 0)


def _dense(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Two products over every expert's rows, the rows of experts not chosen scaled by zero."""
    per_expert = _per_expert(stack, chosen, _scaled(stack, chosen, weights))
    hidden = stack.hidden(u)
    delta = (hidden * stack.per_row(per_expert).to(hidden.dtype)) @ stack.B
    return (y + delta).to(y.dtype)


def _gather(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token's own rows gathered, then small batched products; for few tokens and equal ranks."""
    rank, (n, k) = stack.ranks[0], chosen.shape
    starts = torch.tensor(stack.starts, device=u.device)[chosen.clamp(min=0)]
    rows = (starts[..., None] + torch.arange(rank, device=u.device)).view(n, k * rank)
    u = u.to(stack.A.dtype)
    per_row = _scaled(stack, chosen, weights).to(u.dtype).repeat_interleave(rank, dim=1)  # [N, k·r]
    hidden = torch.bmm(stack.A[rows], u[:, :, None])[:, :, 0] * per_row
    return (y + torch.bmm(hidden[:, None, :], stack.B[rows])[:, 0]).to(y.dtype)


def _grouped(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Tokens sorted by expert, one pair of products per expert in use; any ranks."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    tokens = order // chosen.shape[1]
    scale = _scaled(stack, chosen, weights).reshape(-1)[order].to(stack.A.dtype)[:, None]
    counts = torch.bincount(flat + 1, minlength=stack.experts + 1).tolist()  # [0] counts "nothing chosen"
    total = torch.zeros(y.shape, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
    start = counts[0]
    for expert, count in enumerate(counts[1:]):
        if count:
            mine, rows = slice(start, start + count), stack.rows(expert)
            delta = (stack.hidden(u[tokens[mine]], rows) * scale[mine]) @ stack.B[rows]
            total.index_add_(0, tokens[mine], delta.to(total.dtype))
            start += count
    return (y + total).to(y.dtype)
