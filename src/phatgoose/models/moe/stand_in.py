"""Stand-ins for linear layers that a model computes inside other modules, as a mixture's router.

A router computes W u, from that which experts a token goes to and with what weights, and returns all of it. So no hook
on the router can change W u alone. A `RouterLinear` stands for that product. While it has hooks, the router runs a
second time under them and its first result is dropped, which is cheap.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


class Runner:
    """Runs the stand-ins of one module while they have hooks, in the place of the layers that they stand for.

    It is found again by its hooks on the module.
    """

    handles: list[RemovableHandle]

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.layers: dict[Hashable, list[LinearStandIn]] = {}

    @classmethod
    def on(cls, owner: nn.Module) -> Self | None:
        """The runner of a module; None if none of its stand-ins has a hook."""
        hooks = [*owner._forward_pre_hooks.values(), *owner._forward_hooks.values()]
        objects = (getattr(hook, "__self__", None) for hook in hooks)
        return next((found for found in objects if isinstance(found, cls)), None)

    def add(self, layer: LinearStandIn) -> None:
        known = self.layers.setdefault(layer.key, [])
        if not any(one is layer for one in known):
            known.append(layer)

    def remove(self, layer: LinearStandIn) -> None:
        if left := [one for one in self.layers.pop(layer.key, ()) if one is not layer]:
            self.layers[layer.key] = left
        if not self.layers:
            for handle in self.handles:
                handle.remove()


class LinearStandIn(nn.Module):
    """A linear layer that is part of `weight_owner`. It owns no tensors, has their sizes, and takes forward hooks."""

    runner: ClassVar[type[Runner]]
    weight_owner: Any
    key: Hashable = None
    """Which of the owner's layers it is."""

    def __init__(self, weight_owner: nn.Module):
        super().__init__()
        self.__dict__["weight_owner"] = weight_owner  # through __dict__, so that it is no submodule
        self.out_features, self.in_features = self.weight.shape

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W [d_out, d_in], a view of the owner's parameter."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None: ...

    def forward(self, u: Tensor, y: Tensor | None = None, *_: Any) -> Tensor:
        """W u + b, which is `y` if the owner has computed it already. u: [n, d_in]."""
        return F.linear(u, self.weight, self.bias) if y is None else y

    def register_forward_hook(self, hook: Callable[..., Any], **how: Any) -> RemovableHandle:
        handle = super().register_forward_hook(hook, **how)
        owner = self.weight_owner
        (self.runner.on(owner) or self.runner(owner)).add(self)
        return _StandInHandle(handle, self)


class _StandInHandle(RemovableHandle):
    """Removes a hook of a stand-in, and has the stand-in run no longer when it was the last one."""

    def __init__(self, handle: RemovableHandle, stand_in: LinearStandIn) -> None:
        self.handle, self.stand_in = handle, stand_in

    def remove(self) -> None:
        self.handle.remove()
        runner = self.stand_in.runner.on(self.stand_in.weight_owner)
        if runner is not None and not self.stand_in._forward_hooks:
            runner.remove(self.stand_in)

    # RemovableHandle's own methods keep a weak reference, which this class doesn't have.
    def __getstate__(self) -> Any:
        return self.__dict__

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


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
