"""Putting hooks on a model and taking them off, so that torch.compile notices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


class Hooks:
    """A set of hooks that are removed together; a `with` statement removes them at its end."""

    def __init__(self, handles: Iterable[RemovableHandle] = ()) -> None:
        self._handles: list[RemovableHandle] = []
        try:
            self.add(handles)
        except BaseException:
            self.remove()
            raise

    def __bool__(self) -> bool:
        return bool(self._handles)

    def add(self, handles: Iterable[RemovableHandle]) -> None:
        """Adds hooks that were just registered, or are while they are taken from `handles`: if that fails, those that
        were registered before are among the hooks too."""
        before = len(self._handles)
        for handle in handles:
            self._handles.append(handle)
        if len(self._handles) > before:
            forget_compiled()

    def remove(self, *, forget: bool = True) -> None:
        """Removes all of them. forget: False for hooks that do nothing in compiled code."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if handles and forget:
            forget_compiled()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@torch.compiler.disable
def run_eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function eagerly, between two graphs, where torch.compile compiles the code around it."""
    return function(*args, **kwargs)


def compiled_anything() -> bool:
    """Whether torch.compile has compiled anything since `forget_compiled` was last called."""
    dynamo = sys.modules.get("torch._dynamo")
    # `input_codes` is internal to torch, which has no public way to ask: torch.compiler tells only whether this very
    # call is being compiled, and dynamo's counters are reset by whoever reads them.
    return dynamo is not None and bool(dynamo.convert_frame.input_codes.seen)


def forget_compiled() -> None:
    """Makes torch.compile compile everything again at the next call.

    Compiled code doesn't notice when hooks, or what they do, have changed
    (`torch._dynamo.config.skip_nnmodule_hook_guards`).
    """
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
