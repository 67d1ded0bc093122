"""Which linear layer of a mixture's experts a path means: transformers 5's names, or those of a checkpoint from before."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from phatgoose.errors import RoutingError
from phatgoose.models.base.module_names import plain_name
from phatgoose.models.moe.expert_linear import ExpertLinear, check_fused, is_fused
from phatgoose.models.moe.router_linear import RouterLinear, find_router_linear

_ROUTERS = ("gate", "router")
_LAYER = re.compile(r"(.+)\.(\d+)\.(\w+)")


def modules_by_path(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The model's modules by path, and a `ExpertLinear` for each of `paths` that means a linear layer of fused experts; in place of a
    router that returns its choice, a `RouterLinear`.

    Raises:
        RoutingError: such a path names an expert that isn't there, or experts that can't be routed.
    """
    modules: dict[str, nn.Module] = {
        plain_name(path): module for path, module in model.named_modules(remove_duplicate=False)
    }
    names = _Names(model, modules)
    found = {path: slot for path in paths if (slot := names.slot(path) or names.router(path)) is not None}
    return modules | found


def is_expert_path(path: str) -> bool:
    """Whether a path has the form of a layer of one of a block's experts: two numbers, and one name behind the second."""
    match = _LAYER.fullmatch(path)
    return match is not None and any(part.isdecimal() for part in match[1].split("."))


class _Names:
    """Finds slots by path. What a name means is found out once for all experts of a module."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]):
        self.model, self.modules = model, modules
        self._known: dict[tuple[str, str], tuple[str, str] | None] = {}

    def slot(self, path: str) -> ExpertLinear | None:
        """None if the path means no linear layer of an expert."""
        if path in self.modules or (match := _LAYER.fullmatch(path)) is None:
            return None
        owner, index, name = match[1], int(match[2]), match[3]
        if (owner, name) not in self._known:
            self._known[owner, name] = self._place(owner, name)
        if (place := self._known[owner, name]) is None:
            return None
        experts: Any = self.modules[place[0]]
        if not is_fused(experts):
            raise RoutingError(
                f"{path} is inside {place[0]}, a {type(experts).__name__}, whose experts don't run through transformers' experts "
                "interface; they can't be routed."
            )
        if index >= experts.num_experts:
            raise RoutingError(
                f"{path} is of expert {index}, and {place[0]} has {experts.num_experts}: it is of another base."
            )
        return ExpertLinear(experts, index, place[1])

    def router(self, path: str) -> RouterLinear | None:
        """None if the path means no router that returns its choice."""
        if path not in self.modules and path.rpartition(".")[2] in _ROUTERS:
            renamings, _ = self._table
            path = rename_source_key(f"{path}.weight", renamings, [])[0].removesuffix(".weight")
        return find_router_linear(self.modules[path]) if path in self.modules else None

    def _place(self, owner: str, name: str) -> tuple[str, str] | None:
        """(path of the experts module, which part of it) of OWNER.j.NAME, for any j."""
        module: Any = self.modules.get(owner)
        if is_fused(module):
            check_fused(module, owner)
            whole = ("gate_up_proj", "gate_proj", "up_proj") if module.has_gate else ("up_proj",)
            return (owner, name) if name in (*whole, "down_proj") else None
        if module is not None and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            return owner, name  # experts of another form: refused by name
        return self._converted(owner, name)

    def _converted(self, owner: str, name: str) -> tuple[str, str] | None:
        """The same for the name that a checkpoint had before its experts were fused, by transformers' own table."""
        renamings, converters = self._table
        key, pattern = rename_source_key(f"{owner}.0.{name}.weight", renamings, converters)
        if pattern is None:
            return None
        converter = next(c for c in converters if pattern in c.source_patterns)
        place, _, parameter = key.rpartition(".")
        kinds = [type(operation) for operation in converter.operations]
        number = converter.source_patterns.index(pattern)
        if place not in self.modules or kinds[:1] != [MergeModulelist]:
            return None
        if kinds == [MergeModulelist]:
            part = parameter
        elif kinds == [MergeModulelist, Concatenate] and parameter == "gate_up_proj" and number < 2:
            part = ("gate_proj", "up_proj")[number]
        else:
            return None
        if is_fused(self.modules[place]):
            check_fused(self.modules[place], place)
        return place, part

    @cached_property
    def _table(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        if not isinstance(self.model, PreTrainedModel):
            return [], []
        table = get_model_conversion_mapping(self.model)
        return (
            [entry for entry in table if isinstance(entry, WeightRenaming)],
            [entry for entry in table if isinstance(entry, WeightConverter)],
        )
