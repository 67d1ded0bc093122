"""Score, choose and mix of one module in one call, as the compiled backends do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import fast
from phatgoose.ops.operands import gates_of, kernel_operands
from phatgoose.ops.stack import Layer, Stack

USE_ANOTHER = 'Use backend "auto" or "torch".'
NO_BACKWARD = (
    "it has no backward pass, and a gradient is asked for. Run the model under torch.no_grad() or "
    "torch.inference_mode(), or use "
    'backend "auto" or "torch".'
)


class FusedRouting(Protocol):
    """The three steps of one module in one call. It is made once and called often."""

    def __call__(self, u: Tensor, y: Tensor, into_y: bool = False) -> Tensor | None:
        """y + Σ w Δ(u); u: [..., d_in], y: [..., d_out]. With `into_y`, y may be written into and returned.

        None if score, choose and mix must do it step by step, and the backend is "auto" or torch.compile is tracing.
        """

    def can(self, u: Tensor, y: Tensor) -> bool:
        """Whether `with_choice` can do this call."""

    def with_choice(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output as well as who was chosen, int64 [N, k], and their weights, float32 [N, k]."""


class Choice:
    """A choice that was made elsewhere: chosen int64 [N, k], −1 for nobody, and weights float32 [N, k]."""

    def __init__(self, chosen: Tensor, weights: Tensor):
        self.chosen, self.weights = chosen.contiguous(), weights.float().contiguous()
        self.tokens, self.k = chosen.shape
        self.device = self.chosen.device
        self.at = self.chosen.data_ptr(), self.weights.data_ptr()
        """Their addresses on `device`, which many modules' kernels are given."""


def kernel_obstacle(u: Tensor, y: Tensor, stack: Stack, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why kernels for inference in these dtypes can't do this call, and what to do; None if they can.

    Devices aren't checked.
    """
    if torch.is_grad_enabled() and (u.requires_grad or y.requires_grad):
        return NO_BACKWARD
    if stack.embedding or (u.dtype in dtypes and y.dtype in dtypes and stack.A.dtype in dtypes):
        return None
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"it computes in {', '.join(names)} and {last}, not in {stack.A.dtype} on {u.dtype}. {USE_ANOTHER}"


def refusal(backend: str, why: str) -> RoutingError:
    """The error for a call that a backend was asked for by name and can't do."""
    return RoutingError(f'the "{backend}" backend can\'t do this: {why}')


@dataclass(frozen=True)
class KernelMix:
    """The `mix` of a compiled backend: the low-rank parts in its kernels, other parts by torch."""

    name: str
    """The backend's."""
    obstacle: Callable[[Tensor, Tensor, Stack], str | None]
    """Why the kernels can't do a call, and what to do; None if they can."""
    low_rank: Callable[[Tensor, Tensor, Stack, Tensor, Tensor], Tensor]
    """(u, y, stack, chosen, weights) → y + the low-rank parts, in the kernels."""
    strict: bool = True
    """Whether a call that the kernels can't do is an error. If not, torch does it."""

    def __call__(
        self, u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None = None
    ) -> Tensor:
        """y + Σ_j w_j Δ_{e_j}(u), as `reference.mix`.

        Raises:
            RoutingError: a gradient is asked for, the tensors are of another device, dtype or shape, or, where that
                is checked, an expert is chosen that doesn't exist.
        """
        why = self.obstacle(u, y, stack)
        if why is not None and self.strict:
            raise refusal(self.name, why)
        if chosen.numel() == 0:
            return y
        if why is not None or stack.embedding:  # an embedding takes columns of A, not rows
            return fast.mix(u, y, stack, chosen, weights, layer)
        added = self.low_rank(u, y, stack, chosen, weights)
        return fast.with_others(added, u, y, stack, chosen, weights, layer)


class KernelRouting:
    """What the compiled backends' `FusedRouting` have in common.

    Args:
        gates: standardised [E, d_in], in float32 or rounded to it here.
        strict: whether a call that the kernels can't do is an error. If not, it is left to another backend.

    Raises:
        RoutingError: gates are of another shape, or top_k is below 1.
    """

    mixing: ClassVar[KernelMix]
    """The backend's `mix`, which knows its name and what its kernels can't do."""

    def __init__(
        self, gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None, strict: bool = True
    ):
        self.gates = gates_of(gates, stack, top_k).to(stack.A.device)
        self.top_k = min(top_k, stack.experts)
        self.stack, self.layer, self.strict = stack, layer, strict
        self.plain = stack.low_rank_only
        self.operands = kernel_operands(stack)
        self.gate_operands = [self.gates]

    def __reduce__(self) -> Any:
        # A copied model copies its routing. Whatever points into memory is made anew.
        return type(self), (self.gates, self.top_k, self.stack, self.layer, self.strict)

    def accepts(self, u: Tensor, y: Tensor) -> bool:
        """Whether the kernels can do this call. Raises RoutingError if they can't and `strict` is on."""
        if (why := self.mixing.obstacle(u, y, self.stack)) is None:
            return True
        if self.strict:
            raise refusal(self.mixing.name, why)
        return False

    def can(self, u: Tensor, y: Tensor) -> bool:
        """As `FusedRouting.can`; raises RoutingError if the kernels can't do this call and `strict` is on."""
        return self.accepts(u, y) and not torch.compiler.is_compiling() and type(u) is type(y) is Tensor

    def as_operator(self, u: Tensor, y: Tensor) -> Tensor | None:
        """The call as one operator, for torch.compile to keep in its graph; None if not all is low-rank."""
        if not self.plain:
            return None
        flat_u, flat_y = u.reshape(-1, u.shape[-1]), y.reshape(-1, y.shape[-1])
        tensors, widest = self.operands.tensors, self.operands.widest
        done: Tensor = torch.ops.phatgoose.routed_update(
            flat_u, flat_y, self.gate_operands, tensors, self.top_k, widest
        )
        return done.reshape(y.shape)
