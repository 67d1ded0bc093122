"""What kernels are given must be what they take: they read by address, and a wrong shape is other memory."""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops.stack import Stack


def tokens_of(u: Tensor, y: Tensor, d_in: int, d_out: int) -> int:
    """N of u [..., d_in] and y [..., d_out], whose other dimensions hold as many tokens each.

    Raises:
        RoutingError: they don't.
    """
    if u.shape[-1:] == (d_in,) and y.shape[-1:] == (d_out,):
        tokens = u.shape[:-1].numel()
        if tokens == y.shape[:-1].numel():
            return tokens
    raise RoutingError(
        f"the module's input must be [..., {d_in}] and its output [..., {d_out}], of as many tokens, and they are {list(u.shape)} and "
        f"{list(y.shape)}."
    )


def check_choice(chosen: Tensor, weights: Tensor, tokens: int) -> None:
    """Raises RoutingError: chosen isn't int64 [N, k], or weights aren't numbers of the same shape."""
    fits = chosen.dim() == 2 and chosen.shape[0] == tokens and weights.shape == chosen.shape
    if not fits or chosen.dtype != torch.int64 or not weights.is_floating_point():
        raise RoutingError(
            f"who was chosen must be int64 [{tokens}, k] and the weights float32 of that shape, and they are {_said(chosen)} and "
            f"{_said(weights)}."
        )


def gates_of(gates: Tensor, stack: Stack, top_k: int) -> Tensor:
    """Gates in float32, as kernels read them: [E, d_in].

    Raises:
        RoutingError: they are of another shape, no numbers, or top_k is below 1.
    """
    if top_k < 1:
        raise RoutingError(f"at least 1 expert must be chosen, and top_k is {top_k}.")
    shape = (stack.experts, stack.A.shape[1])
    if stack.embedding or gates.shape != shape or not gates.is_floating_point():
        of = "an embedding, which has none for its input" if stack.embedding else f"float32 {list(shape)}"
        raise RoutingError(f"the module's gates must be {of}, and they are {_said(gates)}.")
    return gates.float().contiguous()


def check_stack(stack: Stack) -> None:
    """Raises RoutingError: A and B don't belong together, or an expert's rows aren't in them."""
    a, b, experts = stack.A, stack.B, len(stack.ranks)
    if a.dtype != b.dtype or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise RoutingError(
            f"a stack's A and B must have as many rows and one dtype, and they are {_said(a)} and {_said(b)}."
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
    """Raises RoutingError: it isn't of this dtype and shape, or its rows have gaps."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise RoutingError(f"{name} must be {dtype} {list(shape)} without gaps, and is {_said(tensor)}.")


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
