"""The one place where hooks are put on a model and taken off it again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


class Hooks:
    """Hooks that go together; usable in a with statement, which takes them off."""

    def __init__(self, handles: Iterable[RemovableHandle] = ()) -> None:
        self._handles: list[RemovableHandle] = []
        self.add(handles)

    def __bool__(self) -> bool:
        return bool(self._handles)

    def add(self, handles: Iterable[RemovableHandle]) -> None:
        """Takes over hooks that were just registered."""
        new = list(handles)
        self._handles += new
        if new:
            forget_compiled()

    def remove(self, *, forget: bool = True) -> None:
        """Takes all of them off. Does nothing if there are none. `forget`: False for hooks that do nothing in compiled code."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if handles and forget:
            forget_compiled()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class StandInHandle(RemovableHandle):
    """Removes a hook of a module that stands for a part of another one, and tells it (`closed`): the other may then run as it did."""

    def __init__(self, handle: RemovableHandle, stand_in: Any) -> None:
        self.handle, self.stand_in = handle, stand_in

    def remove(self) -> None:
        self.handle.remove()
        self.stand_in.closed()

    # RemovableHandle's own keep a weak reference, which this one doesn't have.
    def __getstate__(self) -> Any:
        return self.__dict__

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


@torch.compiler.disable
def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls it as it is, between two graphs, where torch.compile compiles what is around it."""
    return function(*args, **kwargs)


def compiled_anything() -> bool:
    """Whether torch.compile has compiled anything since it was last made to forget it."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.convert_frame.input_codes.seen)


def forget_compiled() -> None:
    """Makes torch.compile compile everything anew when it runs next: what it has compiled doesn't notice that hooks, or what they do,
    have changed (`torch._dynamo.config.skip_nnmodule_hook_guards`)."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
