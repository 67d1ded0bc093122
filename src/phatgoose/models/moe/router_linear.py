"""The linear layer inside a mixture's router: its scores are changed before the router chooses among its experts.

A router computes W u, and from that, which experts a token goes to and with what weights; it returns all of it, so no hook on
the router can change W u alone. A `RouterLinear` stands for that product and takes forward hooks as a linear layer would. While it
has some, the router runs a second time under them, and what it gave at first is dropped: it is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from phatgoose.models.attach.hooks import StandInHandle


class RouterLinear(nn.Module):
    """W u (+ b) of a router, as a linear layer. router: a module of transformers' whose forward has exactly one such product."""

    router: Any

    def __init__(self, router: nn.Module):
        super().__init__()
        self.__dict__["router"] = router  # not a submodule
        self.out_features, self.in_features = self.weight.shape

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight, and has it moved where it is offloaded."""
        module: nn.Module = self.router
        return module

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.router.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.router, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def forward(self, u: Tensor, y: Tensor | None = None) -> Tensor:
        """The product, which is `y` where the router has computed it already."""
        return F.linear(u, self.weight, self.bias) if y is None else y

    def register_forward_hook(self, hook: Callable[..., Any], **how: Any) -> RemovableHandle:
        handle = super().register_forward_hook(hook, **how)
        opened = _opened(self.router) or _Opened(self.router)
        if not any(slot is self for slot in opened.slots):
            opened.slots.append(self)
        return StandInHandle(handle, self)

    def closed(self) -> None:
        """A hook was removed: with the last one of all its slots, the router runs as it did."""
        opened = _opened(self.router)
        if opened is None or self._forward_hooks:
            return
        opened.slots = [slot for slot in opened.slots if slot is not self]
        if not opened.slots:
            opened.handle.remove()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, of {type(self.router).__name__}"


class _Opened:
    """A router that runs again with the hooks of its slots; known by its hook on the router."""

    def __init__(self, router: nn.Module):
        self.slots: list[RouterLinear] = []
        self.handle = router.register_forward_hook(self.again, with_kwargs=True, prepend=True)

    @torch.compiler.disable
    def again(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with _Products(self.slots[0].weight.shape, self._through):
            return module.forward(*args, **kwargs)

    def _through(self, u: Tensor, y: Tensor) -> Tensor:
        for slot in self.slots:
            y = slot(u, y)
        return y


class _Products(TorchFunctionMode):
    """Hands the products with a weight of this shape on, and takes what comes back in their place."""

    def __init__(self, shape: torch.Size, change: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.shape, self.change, self.number = shape, change, 0

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
        self.number += 1
        return self.change(u, y)


def _opened(router: nn.Module) -> _Opened | None:
    owners = (getattr(hook, "__self__", None) for hook in router._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, _Opened)), None)


def find_router_linear(module: nn.Module) -> RouterLinear | None:
    """The slot of a module that computes one product with its own `weight` and returns more than that; None of any other."""
    weight = getattr(module, "weight", None)
    if not type(module).__module__.startswith("transformers.models.") or not isinstance(weight, nn.Parameter):
        return None
    if weight.ndim != 2 or not weight.is_floating_point() or hasattr(module, "num_embeddings"):
        return None
    from accelerate.utils import align_module_device

    with align_module_device(module), torch.no_grad():
        there = next(module.parameters())
        u = torch.zeros(1, weight.shape[1], dtype=there.dtype, device=there.device)
        for tried in (u, u[None]):
            products = _Products(weight.shape, lambda u, y: y)
            try:
                with products:
                    output = module.forward(tried)
            except Exception:  # what it needs beside tokens, nobody knows
                continue
            if products.number == 1 and isinstance(output, tuple | list):
                return RouterLinear(module)
    return None
