"""Score, choose and mix by batched torch operations, with the results of `reference.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.ops.reference import EPS
from phatgoose.ops.stack import VECTOR_TERMS, Layer, Stack

# Measured by benchmarks/ops.py on a CPU (576 → 1536, rank 16, k = 2). `low_rank_method` uses them. In
# float32, copying rows costs more than it saves, and so does multiplying rows that nobody wants.
DENSE_ROWS = 1024
"""In 16 bits, up to this many stacked rows one product over all experts is cheapest, …"""
DENSE_SHARE = 3
"""… unless fewer than one row in this many is wanted."""
GATHER_TOKENS = 64
"""In 16 bits, up to this many tokens it is cheapest that each gathers its own rows."""
LOOP_TOKENS = 4
"""Up to this many tokens, a loop over experts costs less than a grouped product."""

LowRankMethod = Callable[[Tensor, Tensor, Stack, Tensor, Tensor], Tensor]
"""(u, y, stack, chosen, weights) → y + the low-rank parts."""


def gate_scores(u: Tensor, gates: Tensor) -> Tensor:
    """score_e = v̄_eᵀ ū / √d in float32 (float64 if u is). u: [N, d], gates: standardised [E, d] → [N, E]."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    scale: float = u.shape[-1] ** -0.5
    return F.layer_norm(u, u.shape[-1:], eps=EPS) @ gates.to(u.dtype).T * scale


def choose(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of every token and the softmax over their scores. Ties are broken arbitrarily."""
    values, chosen = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    return chosen, values.softmax(-1)


def mix(
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None = None
) -> Tensor:
    """y + Σ_j w_j Δ_{e_j}(u), the low-rank parts by the cheapest method for this many tokens and stacked rows."""
    if chosen.numel() == 0:
        return y
    added = low_rank(u, y, stack, chosen, weights)
    return with_others(added, u, y, stack, chosen, weights, layer)


def low_rank(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """y + the low-rank parts. At least one choice, N·k, must be made."""
    if not stack.A.shape[0]:
        return y
    return low_rank_method(stack, *chosen.shape)(u, y, stack, chosen, weights)


def low_rank_method(stack: Stack, tokens: int, k: int) -> LowRankMethod:
    """The method that was measured to be cheapest for k choices of each of this many tokens."""
    rows, wanted = stack.A.shape[0], tokens * k * max(stack.ranks)
    sixteen_bits = stack.A.dtype.itemsize == 2
    # Rows that nobody owns may hold anything, NaN too, so no dense product may include them.
    if sixteen_bits and rows <= min(DENSE_ROWS, DENSE_SHARE * wanted) and not stack.has_gaps:
        return dense
    equal_ranks = len(set(stack.ranks)) == 1 and not stack.embedding
    if equal_ranks and sixteen_bits and tokens <= GATHER_TOKENS:
        return gather
    if equal_ranks and tokens > LOOP_TOKENS and _can_group(stack):
        return grouped
    return loop


def with_others(
    added: Tensor, u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None
) -> Tensor:
    """`added`, which is y + the low-rank parts, with all other parts.

    u: [..., d_in], y: [..., d_out], chosen and weights: [N, k].
    """
    if stack.low_rank_only:
        return added
    flat = u.reshape(-1) if stack.embedding else u.reshape(-1, u.shape[-1])
    others = _others(flat, y.reshape(-1, y.shape[-1]), stack, chosen, weights, layer)
    return (added + others.reshape(y.shape)).to(y.dtype)


def _others(
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None
) -> Tensor:
    """Everything but the low-rank parts: [N, d_out] in float32 or wider.

    Each term is computed once for the weighted sum of its vectors, so W runs once, whatever number of experts
    scale its input.
    """
    per_expert = _per_expert(stack, chosen, weights)
    own = y.to(torch.promote_types(y.dtype, torch.float32))
    total = torch.zeros_like(own)
    for name, vectors in stack.vectors.items():
        total = total + VECTOR_TERMS[name](vectors.sum(per_expert), u, own, layer)
    for expert, bottleneck in stack.bottlenecks:
        weight = per_expert[:, expert, None].to(own.dtype)
        if weight.is_cuda or bool((weight != 0).any()):  # a GPU would have to be waited for
            delta = weight * bottleneck.apply(y, stack.residual).to(own.dtype)
            total = total + torch.where(weight != 0, delta, 0)
    return total


def _per_expert(stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each expert's weight for each token: [N, k] → [N, E]."""
    per_expert = weights.new_zeros((chosen.shape[0], stack.experts))
    return per_expert.scatter_add(1, chosen.clamp(min=0), torch.where(chosen >= 0, weights, 0))


def _scaled(stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """weights times their experts' scales, 0 where nothing is chosen: [N, k]."""
    scales = stack.scale_vector(weights.device).to(weights.dtype)
    return torch.where(chosen >= 0, weights * scales[chosen.clamp(min=0)], 0)


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """A u times its weights. It is 0 where they are: in float16, A u of an expert that nobody chose may be
    infinite, and 0 times that is NaN."""
    return torch.where(weights != 0, hidden, 0) * weights.to(hidden.dtype)


def dense(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Two products over every expert's rows, the rows of experts not chosen scaled by zero."""
    per_expert = _per_expert(stack, chosen, _scaled(stack, chosen, weights))
    hidden = stack.hidden(u)
    delta = _weighted(hidden, stack.per_row(per_expert)) @ stack.B
    return (y + delta).to(y.dtype)


def gather(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token's own rows gathered, then small batched products; for few tokens and equal ranks."""
    rank, (n, k) = stack.ranks[0], chosen.shape
    starts = stack.start_vector(u.device)[chosen.clamp(min=0)]
    rows = (starts[..., None] + torch.arange(rank, device=u.device)).view(n, k * rank)
    u = u.to(stack.A.dtype)
    per_row = _scaled(stack, chosen, weights).repeat_interleave(rank, dim=1)  # [N, k·r]
    hidden = _weighted(torch.bmm(stack.A[rows], u[:, :, None])[:, :, 0], per_row)
    return (y + torch.bmm(hidden[:, None, :], stack.B[rows])[:, 0]).to(y.dtype)


def _can_group(stack: Stack) -> bool:
    """Whether torch's grouped product takes these matrices: one after the other, every row a multiple of 16 bytes."""
    size, rank = stack.A.dtype.itemsize, stack.ranks[0]
    widths = (rank, stack.A.shape[1], stack.B.shape[1])
    return (
        hasattr(F, "grouped_mm")
        and not stack.has_gaps
        and stack.starts == tuple(range(0, rank * stack.experts, rank))
        and all(width and width * size % 16 == 0 for width in widths)
        # What stands for it while a compiler looks takes bfloat16 alone.
        and stack.A.dtype
        in ((torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float32))
        and stack.A.is_contiguous()
        and stack.B.is_contiguous()
    )


def grouped(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Tokens sorted by expert, two grouped products; for equal ranks."""
    rank, k = stack.ranks[0], chosen.shape[1]
    flat = chosen.reshape(-1).clamp(min=0)  # where nothing is chosen, expert 0 with weight 0
    order = flat.argsort(stable=True)
    tokens = order // k
    scale = _scaled(stack, chosen, weights).reshape(-1)[order][:, None]
    ends = torch.bincount(flat, minlength=stack.experts).cumsum(0).to(torch.int32)
    a, b = (m.view(stack.experts, rank, -1) for m in (stack.A, stack.B))
    hidden = _weighted(F.grouped_mm(u[tokens].to(a.dtype), a.transpose(1, 2), offs=ends), scale)
    delta = F.grouped_mm(hidden, b, offs=ends)
    total = torch.zeros(y.shape, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
    return (y + total.index_add(0, tokens, delta.to(total.dtype))).to(y.dtype)


def loop(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    """Tokens sorted by expert, one pair of products per expert in use; any ranks and any rows."""
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
