"""What kernels are given, checked first: they read by address, without bounds."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops.stack import Stack

_LOCK = threading.RLock()
"""Guards what is kept with a stack: two threads that come first would replace what the other's kernel reads."""


@dataclass(frozen=True, eq=False)
class KernelOperands:
    """A stack as kernels take it, contiguous and on the stack's device."""

    a: Tensor
    b: Tensor
    owners: Tensor
    """int32 [2, E]: starts and ranks."""
    scales: Tensor
    """float32 [E]."""
    widest: int
    """The highest rank."""

    @property
    def tensors(self) -> list[Tensor]:
        return [self.a, self.b, self.owners, self.scales]


def kernel_operands(stack: Stack) -> KernelOperands:
    """The operands of this stack, made once and kept with it. Raises RoutingError as `check_stack`."""
    known: KernelOperands | None = stack.__dict__.get("_known_operands")
    if known is not None:
        return known
    with _LOCK:
        if (known := stack.__dict__.get("_known_operands")) is None:
            check_stack(stack)
            device = stack.A.device
            owners = torch.tensor([stack.starts, stack.ranks], dtype=torch.int32).to(device)
            scales, widest = stack.scale_vector(device), max(stack.ranks, default=0)
            known = KernelOperands(stack.A.contiguous(), stack.B.contiguous(), owners, scales, widest)
            stack.__dict__["_known_operands"] = known
        return known


def tokens_of(u: Tensor, y: Tensor, d_in: int, d_out: int) -> int:
    """N, the number of tokens in both u [..., d_in] and y [..., d_out]. Raises RoutingError for other shapes."""
    if u.shape[-1:] == (d_in,) and y.shape[-1:] == (d_out,):
        tokens = u.shape[:-1].numel()
        if tokens == y.shape[:-1].numel():
            return tokens
    raise RoutingError(
        f"the module's input must be [..., {d_in}] and its output [..., {d_out}], with as many tokens in both. "
        f"They are {list(u.shape)} and {list(y.shape)}."
    )


def check_choice(chosen: Tensor, weights: Tensor, tokens: int) -> None:
    """Raises RoutingError unless `chosen` is int64 [N, k] and `weights` are floats of that shape."""
    fits = chosen.dim() == 2 and chosen.shape[0] == tokens and weights.shape == chosen.shape
    if not fits or chosen.dtype != torch.int64 or not weights.is_floating_point():
        raise RoutingError(
            f"the chosen experts must be int64 [{tokens}, k], and their weights float32 of that shape. "
            f"They are {_described(chosen)} and {_described(weights)}."
        )


def gates_of(gates: Tensor, stack: Stack, top_k: int) -> Tensor:
    """Gates [E, d_in] in contiguous float32, as kernels read them. Raises RoutingError for others, or top_k < 1."""
    if top_k < 1:
        raise RoutingError(f"at least 1 expert must be chosen, and top_k is {top_k}.")
    shape = (stack.experts, stack.A.shape[1])
    if stack.embedding:
        raise RoutingError(
            "gates must read the module's input to be fused with it, and an embedding's don't."
        )
    if gates.shape != shape or not gates.is_floating_point():
        raise RoutingError(
            f"the module's gates must be float32 {list(shape)}, and they are {_described(gates)}."
        )
    return gates.float().contiguous()


def check_stack(stack: Stack) -> None:
    """Raises RoutingError if A and B don't belong together, or an expert's rows aren't in them."""
    a, b, experts = stack.A, stack.B, len(stack.ranks)
    if a.dtype != b.dtype or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise RoutingError(
            "a stack's A and B must have as many rows and one dtype, and they are "
            f"{_described(a)} and {_described(b)}."
        )
    if len(stack.starts) != experts or len(stack.scales) != experts:
        raise RoutingError(
            f"a stack of {experts} experts has {len(stack.starts)} starts and {len(stack.scales)} scales."
        )
    for expert, (start, rank) in enumerate(zip(stack.starts, stack.ranks, strict=True)):
        if rank < 0 or (rank and not 0 <= start <= a.shape[0] - rank):
            raise RoutingError(
                f"rows {start} to {start + rank} of expert {expert} aren't in a stack of {a.shape[0]} rows."
            )


def check_is(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raises RoutingError unless the tensor has this dtype and shape and is contiguous."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise RoutingError(f"{name} must be {dtype} {list(shape)} without gaps, and is {_described(tensor)}.")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
