"""Routing as operators that compilers can carry: torch.ops.phatgoose.*, each with a fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("phatgoose::routed_update", mutates_args=())
def routed_update(
    u: Tensor, y: Tensor, gates: Tensor, codes: Tensor, facts: Tensor, a: Tensor, b: Tensor, owners: Tensor, scales: Tensor,
    top_k: int, widest: int,
) -> Tensor:  # fmt: skip
    """y + Σ w Δ(u), a new tensor, the top_k experts chosen by their gates: u [N, d_in], y [N, d_out].

    gates: standardised, float32 [E, d_in]. codes, facts: their scan, for the CPU kernel; without codes it is Triton's call. a [R, d_in],
    b [R, d_out], owners int32 [2, E] (starts, ranks), scales float32 [E]: the stack, whose highest rank is `widest`.

    Raises:
        RoutingError: a tensor is of another shape or dtype. That the stack has the rows that `owners` names isn't looked at.
    """
    if codes.numel():
        from phatgoose.ops.cpu import backend as cpu

        return cpu.scanned_update(u, y, (gates, codes, facts), (a, b, owners, scales), top_k)
    from phatgoose.ops.triton import launch as triton

    rows = triton.Rows(a, b, owners, scales, widest)
    out = triton.updated(rows, u, y, gates, top_k)[0]
    return out.clone() if out is y else out


@routed_update.register_fake
def _(
    u: Tensor, y: Tensor, gates: Tensor, codes: Tensor, facts: Tensor, a: Tensor, b: Tensor, owners: Tensor, scales: Tensor,
    top_k: int, widest: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("phatgoose::routed_mix", mutates_args=())
def routed_mix(
    u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor, a: Tensor, b: Tensor, owners: Tensor, scales: Tensor, widest: int
) -> Tensor:  # fmt: skip
    """y + Σ w Δ(u), a new tensor, of experts chosen elsewhere: chosen int64 and weights float32 [N, k], −1 is nothing.

    `widest` is for Triton; 0 makes it the CPU kernel's call.

    Raises:
        RoutingError: as `routed_update`; or, on CPUs, an expert is chosen that there isn't.
    """
    if not widest:
        from phatgoose.ops.cpu import backend as cpu

        return cpu.chosen_update(u, y, chosen, weights, (a, b, owners, scales))
    from phatgoose.ops.triton import launch as triton

    rows = triton.Rows(a, b, owners, scales, widest)
    return (
        triton.mixed(rows, u, y, chosen.contiguous(), weights.contiguous()) if chosen.numel() else y.clone()
    )


@routed_mix.register_fake
def _(
    u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor, a: Tensor, b: Tensor, owners: Tensor, scales: Tensor, widest: int
) -> Tensor:  # fmt: skip
    return torch.empty_like(y, memory_format=torch.contiguous_format)
