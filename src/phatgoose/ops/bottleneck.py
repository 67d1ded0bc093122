"""Bottleneck adapters as an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops.running import Running

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
NORM_EPS = 1e-5
_TENSORS = ("down", "up", "down_bias", "up_bias", "norm_weight", "norm_bias")


class Narrow(Protocol):
    """A bottleneck adapter: scale · (up f(down x + down_bias) + up_bias), x the module's own output y if nothing else is said."""

    @property
    def down(self) -> Tensor: ...
    @property
    def up(self) -> Tensor: ...
    @property
    def down_bias(self) -> Tensor | None: ...
    @property
    def up_bias(self) -> Tensor | None: ...
    @property
    def activation(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def norm_weight(self) -> Tensor | None: ...
    @property
    def norm_bias(self) -> Tensor | None: ...
    @property
    def residual(self) -> str | None: ...
    @property
    def reads_output(self) -> bool: ...


class Residual(Running):
    """h, the stream that a module's output y is added to, from where it appears until the module has run.

    Hooks fill and empty it: h is no input of the module, and some bottleneck adapters read it.
    """

    value: Tensor | None = None

    def read(self, y: Tensor) -> Tensor:
        """h in y's shape, dtype and place.

        Raises:
            RoutingError: the module was run without the layer around it.
        """
        if self.value is None:
            raise RoutingError(
                "a bottleneck adapter reads the residual stream that its module's output is added to, and there is none: the module "
                "was run by itself. Run the whole model."
            )
        return self.value.reshape(y.shape).to(y.device, y.dtype)


@dataclass(frozen=True, eq=False)
class Branch:
    """A bottleneck adapter in a stack, as `Narrow`; residual: where h is found, None if it isn't read."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    activation: str
    scale: float
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    residual: Residual | None = None
    reads_output: bool = True

    def to(self, *target: Any) -> Branch:
        changed = {n: t.to(*target) for n in _TENSORS if (t := getattr(self, n)) is not None}
        return replace(self, **changed)


def narrow(y: Tensor, b: Branch) -> Tensor:
    """scale · (up f(down x + down_bias) + up_bias) in the dtype of its weights; x is y, y + h or h: [N, d_out] → [N, d_out]."""
    x = y
    if b.residual is not None:
        h = b.residual.read(y)
        x = y + h if b.reads_output else h
    x = x.to(b.down.dtype)
    if b.norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], b.norm_weight, b.norm_bias, NORM_EPS)
    hidden = ACTIVATIONS[b.activation](F.linear(x, b.down, b.down_bias))
    return F.linear(hidden, b.up, b.up_bias) * b.scale


def branch(b: Narrow, residual: Residual | None, dtype: torch.dtype) -> Branch:
    """A bottleneck adapter as a stack keeps it: tensors in `dtype`, h from `residual` where it reads h."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype)

    return Branch(
        down=b.down.detach().to(dtype),
        up=b.up.detach().to(dtype),
        down_bias=cast(b.down_bias),
        up_bias=cast(b.up_bias),
        activation=b.activation,
        scale=float(b.scale),
        norm_weight=cast(b.norm_weight),
        norm_bias=cast(b.norm_bias),
        residual=residual if b.residual is not None else None,
        reads_output=b.reads_output,
    )
