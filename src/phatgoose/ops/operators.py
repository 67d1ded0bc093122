"""Routing as operators that compilers can carry: torch.ops.phatgoose.*, each with a fake kernel.

They take a module's tensors as lists: `gates` is [gates] for Triton and what `kernel_gates` returns for the
CPU kernel; `rows` are `KernelOperands.tensors`: [a, b, owners, scales].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phatgoose.ops.cpu import backend as cpu
from phatgoose.ops.operands import KernelOperands
from phatgoose.ops.triton import launch as triton


@torch.library.custom_op("phatgoose::routed_update", mutates_args=())
def routed_update(
    u: Tensor, y: Tensor, gates: Sequence[Tensor], rows: Sequence[Tensor], top_k: int, widest: int
) -> Tensor:
    """y + Σ w Δ(u), a new tensor, the top_k experts chosen by their gates: u [N, d_in], y [N, d_out].

    `widest` is the stack's highest rank, for Triton.

    Raises:
        RoutingError: a tensor is of another shape or dtype. That the stack has the rows that `owners` names
            isn't checked.
    """
    if len(gates) > 1:
        return cpu.routed_update(u, y, gates, rows, top_k)
    a, b, owners, scales = rows
    out = triton.updated(KernelOperands(a, b, owners, scales, widest), u, y, gates[0], top_k)[0]
    return out.clone() if out is y else out  # an operator may not return what it was given


@routed_update.register_fake
def _(
    u: Tensor, y: Tensor, gates: Sequence[Tensor], rows: Sequence[Tensor], top_k: int, widest: int
) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("phatgoose::routed_mix", mutates_args=())
def routed_mix(
    u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor, rows: Sequence[Tensor], widest: int
) -> Tensor:
    """y + Σ w Δ(u), a new tensor, of experts chosen elsewhere: chosen int64 and weights float32 [N, k]; −1 is nothing.

    `widest` is the stack's highest rank, for Triton; 0 makes it the CPU kernel's call.

    Raises:
        RoutingError: as `routed_update`; or, on CPUs, an expert is chosen that doesn't exist.
    """
    if not widest:
        return cpu.routed_mix(u, y, chosen, weights, rows)
    if not chosen.numel():
        return y.clone()
    a, b, owners, scales = rows
    operands = KernelOperands(a, b, owners, scales, widest)
    return triton.mixed(operands, u, y, chosen.contiguous(), weights.contiguous())


@routed_mix.register_fake
def _(u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor, rows: Sequence[Tensor], widest: int) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)
