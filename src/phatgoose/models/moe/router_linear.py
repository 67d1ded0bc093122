"""The linear layer inside a mixture's router, as a module that takes hooks.

A router computes W u, from that which experts a token goes to and with what weights, and returns all of it. So no hook
on the router can change W u alone. A `RouterLinear` stands for that product. While it has hooks, the router runs a
second time under them and its first result is dropped, which is cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from phatgoose.models.moe.stand_in import LinearStandIn, Runner


class _Rerun(Runner):
    """Runs a router again with its stand-ins in the product's place."""

    def __init__(self, owner: nn.Module):
        super().__init__(owner)
        self.handles = [owner.register_forward_hook(self.run_again, with_kwargs=True, prepend=True)]

    @torch.compiler.disable
    def run_again(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with _ReplaceProducts(self.owner.weight.shape, self._call):
            return module.forward(*args, **kwargs)

    def _call(self, u: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers[None]:
            y = layer(u, y)
        return y


class RouterLinear(LinearStandIn):
    """W u (+ b) of a router. weight_owner: a transformers module whose forward computes exactly one such product."""

    runner = _Rerun

    @property
    def weight(self) -> Tensor:
        return self.weight_owner.weight

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.weight_owner, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, of {type(self.weight_owner).__name__}"


class _ReplaceProducts(TorchFunctionMode):
    """Inside, `F.linear` with a weight of this shape returns change(u, its result); `count` is how often it did."""

    def __init__(self, shape: torch.Size, change: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.shape, self.change, self.count = shape, change, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        if func is not F.linear:
            return y
        u, weight = [*args, *kwargs.values()][:2]
        if weight.shape != self.shape:
            return y
        self.count += 1
        return self.change(u, y)


def find_router_linear(module: nn.Module) -> RouterLinear | None:
    """The stand-in for a module that computes one product with its own `weight` and returns more than that; else None.

    It finds out by running the module on a zero vector.
    """
    weight = getattr(module, "weight", None)
    if not type(module).__module__.startswith("transformers.models.") or not isinstance(weight, nn.Parameter):
        return None
    if weight.ndim != 2 or not weight.is_floating_point() or hasattr(module, "num_embeddings"):
        return None
    from accelerate.utils import align_module_device

    with align_module_device(module), torch.no_grad():
        parameter = next(module.parameters())
        u = torch.zeros(1, weight.shape[1], dtype=parameter.dtype, device=parameter.device)
        for tried in (u, u[None]):  # some routers take [tokens, d], some [rows, tokens, d]
            try:
                with _ReplaceProducts(weight.shape, lambda u, y: y) as products:
                    output = module.forward(tried)
            except Exception:  # it needs other arguments, so it isn't such a router
                continue
            if products.count == 1 and isinstance(output, tuple | list):
                return RouterLinear(module)
    return None
