"""A stand-in: a module for a linear layer that the model computes inside another module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

R = TypeVar("R")


class LinearStandIn(nn.Module):
    """A linear layer that is part of `weight_owner`. It owns no tensors, but has their sizes and takes forward hooks.

    While it has hooks, something that `start_hooking` attaches to the weight's owner runs the stand-in in the layer's
    place.
    """

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

    @abstractmethod
    def start_hooking(self) -> None:
        """Called after each hook is registered: from now on the owner must call this stand-in."""

    @abstractmethod
    def stop_hooking(self) -> None:
        """Called when the last hook has been removed: the owner may run as it did before."""

    def forward(self, u: Tensor, y: Tensor | None = None, *_: Any) -> Tensor:
        """W u + b, which is `y` if the owner has computed it already. u: [n, d_in]."""
        return F.linear(u, self.weight, self.bias) if y is None else y

    def register_forward_hook(self, hook: Callable[..., Any], **how: Any) -> RemovableHandle:
        handle = super().register_forward_hook(hook, **how)
        self.start_hooking()
        return _StandInHandle(handle, self)


class _StandInHandle(RemovableHandle):
    """Removes a hook of a stand-in, and tells the stand-in when it was the last one."""

    def __init__(self, handle: RemovableHandle, stand_in: LinearStandIn) -> None:
        self.handle, self.stand_in = handle, stand_in

    def remove(self) -> None:
        self.handle.remove()
        if not self.stand_in._forward_hooks:
            self.stand_in.stop_hooking()

    # RemovableHandle's own methods keep a weak reference, which this class doesn't have.
    def __getstate__(self) -> Any:
        return self.__dict__

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


def hook_object(hooks: Mapping[Any, Any], kind: type[R]) -> R | None:
    """The object of this class one of whose methods is among the hooks; None if there is none."""
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((owner for owner in owners if isinstance(owner, kind)), None)
