"""A stand-in: a module for a linear layer that the model computes inside another module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn
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
