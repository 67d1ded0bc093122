"""Bottleneck adapters: their tensors, and what they compute from a module's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops.forward_state import ForwardState

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "relu6": F.relu6,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}
"""Nonlinearities that are computed exactly."""
NORM_EPS = 1e-5


class Residual(ForwardState):
    """h, the residual stream that a module's output y is added to. Some bottleneck adapters read it.

    h is no input of the module, so hooks fill this before the module runs and empty it afterwards.
    """

    value: Tensor | None = None

    def read(self, y: Tensor) -> Tensor:
        """h in y's shape, dtype and device. Raises RoutingError if the module was run without the layer around it."""
        if self.value is None:
            raise RoutingError(
                "a bottleneck adapter reads the residual stream that its module's output is added to, and "
                "there is none: the module was run by itself. Run the whole model."
            )
        return self.value.reshape(y.shape).to(y.device, y.dtype)


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """scale · (U f(D x + d) + u₀), a bottleneck adapter without its residual connection.

    Houlsby et al. 2019; Pfeiffer et al. 2021. down: D [r, d_out], down_bias: d [r], up: U [d_out, r], up_bias:
    u₀ [d_out]; `activation` is one of ACTIVATIONS. x is the module's own output y unless `residual` and
    `reads_output` say otherwise.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str = "relu"
    scale: float = 1.0
    norm_weight: Tensor | None = None
    """[d_out], with norm_bias: x goes through this layer norm first (eps 1e-5)."""
    norm_bias: Tensor | None = None
    residual: str | None = None
    """Path of the module whose input is h, the residual stream that y is added to; x is then y + h, or h."""
    reads_output: bool = True
    """Whether y is part of x. False only with a residual (parallel adapters, He et al. 2021)."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, *target: Any) -> Bottleneck:
        """A copy whose tensors are on this device or in this dtype, as `Tensor.to` takes them."""
        moved: dict[str, Any] = {name: tensor.to(*target) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def detached(self, dtype: torch.dtype) -> Bottleneck:
        """A copy in this dtype that no gradient reaches."""
        moved: dict[str, Any] = {name: tensor.detach().to(dtype) for name, tensor in self.tensors().items()}
        return replace(self, scale=float(self.scale), **moved)

    def apply(self, y: Tensor, residual: Residual | None) -> Tensor:
        """What it adds to the module's output y [N, d_out], in the dtype of its weights; h is in `residual`."""
        x = y
        if self.residual is not None:
            assert residual is not None
            h = residual.read(y)
            x = y + h if self.reads_output else h
        x = x.to(self.down.dtype)
        if self.norm_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias, NORM_EPS)
        hidden = ACTIVATIONS[self.activation](F.linear(x, self.down, self.down_bias))
        return F.linear(hidden, self.up, self.up_bias) * self.scale
