"""A warning, given once, about experts at modules that don't run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from phatgoose.models.attach.hooks import Hooks, compiled_anything
from phatgoose.models.context.runs import cache_of, length_of
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.expert_linear import ExpertLinear

SHOWN = 5
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=_)\d+(?=\.)")  # layers.3, and expert_3 of Switch


class IdleModuleCheck:
    """Watches which modules run, until the model has run once as a whole. After that it costs nothing.

    Args:
        modules: (path, module) of each.
        streams: the model's. There is no warning about modules of an encoder or decoder that hasn't run.
    """

    def __init__(self, model: nn.Module, modules: Iterable[tuple[str, nn.Module]], streams: Streams):
        # Which of a mixture's experts run depends on the tokens.
        self.modules = {path: module for path, module in modules if not isinstance(module, ExpertLinear)}
        self.stacks = {prefix: streams.stacks[name] for name, prefix in streams.prefixes.items() if prefix}
        self.ran = set[str]()
        self.whole = False
        self.hooks = Hooks(self._watch(model))

    def _watch(self, model: nn.Module) -> Iterator[RemovableHandle]:
        if not self.modules:
            return
        for path, module in (self.modules | self.stacks).items():
            yield module.register_forward_pre_hook(partial(self._note, path))
        yield model.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield model.register_forward_hook(self._done)

    def _note(self, path: str, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.ran.add(path)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            # With a cache, cross-attention's keys and values aren't computed again.
            self.whole = not length_of(cache_of(kwargs))

    def _done(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or not self.hooks or not self.whole:
            return
        self.hooks.remove(forget=False)
        # Modules that run inside compiled code weren't seen.
        if compiled_anything():
            return
        waiting = tuple(path for path in self.stacks if path not in self.ran)
        sometimes = {_family(path) for path in self.ran}
        found = [
            path
            for path in self.modules
            if path not in self.ran and _family(path) not in sometimes and not path.startswith(waiting)
        ]
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            warnings.warn(
                f"experts adapt {', '.join(found[:SHOWN])}{more}, which didn't run in the model's first pass: there "
                "they have done nothing yet, and never will if the model doesn't call these modules. (Some run for "
                "some inputs only, as for images.)",
                stacklevel=2,
            )


def _family(path: str) -> str:
    """The path without its last number if it has several: the same for all experts of a mixture."""
    numbers = list(_NUMBER.finditer(path))
    return path if len(numbers) < 2 else f"{path[: numbers[-1].start()]}*{path[numbers[-1].end() :]}"
