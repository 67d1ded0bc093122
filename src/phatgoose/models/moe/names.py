"""Module path → the linear layer of a mixture that it means, by its new or old name."""

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
from phatgoose.models.moe.stand_in import RouterLinear, find_router_linear

_ROUTERS = ("gate", "router")
_LAYER = re.compile(r"(.+)\.(\d+)\.(\w+)")


def modules_by_path(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The model's modules by path, with stand-ins for the layers of mixtures among `paths`.

    These are an `ExpertLinear` for a linear layer of fused experts, and a `RouterLinear` in place of a mixture's
    router.

    Raises:
        RoutingError: a path names an expert that doesn't exist, or experts that can't be routed.
    """
    modules: dict[str, nn.Module] = {
        plain_name(path): module for path, module in model.named_modules(remove_duplicate=False)
    }
    names = _MixtureNames(model, modules)
    found = {path: names.expert_linear(path) or names.router_linear(path) for path in paths}
    return modules | {path: stand_in for path, stand_in in found.items() if stand_in is not None}


def is_expert_path(path: str) -> bool:
    """True if a path looks like a layer of one of a block's experts: two numbers, and one name after the second."""
    match = _LAYER.fullmatch(path)
    return match is not None and any(part.isdecimal() for part in match[1].split("."))


class _MixtureNames:
    """Finds stand-ins by path. What a name means is looked up once for all experts of a module."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]):
        self.model, self.modules = model, modules
        self._locations: dict[tuple[str, str], tuple[str, str] | None] = {}

    def expert_linear(self, path: str) -> ExpertLinear | None:
        """None if the path doesn't mean a linear layer of an expert."""
        if path in self.modules or (match := _LAYER.fullmatch(path)) is None:
            return None
        owner, index, name = match[1], int(match[2]), match[3]
        if (owner, name) not in self._locations:
            self._locations[owner, name] = self._locate(owner, name)
        if (location := self._locations[owner, name]) is None:
            return None
        experts_path, part = location
        experts: Any = self.modules[experts_path]
        if not is_fused(experts):
            raise RoutingError(
                f"{path} is inside {experts_path}, a {type(experts).__name__}, whose experts don't run through "
                "transformers' experts interface; they can't be routed."
            )
        if index >= experts.num_experts:
            raise RoutingError(
                f"{path} is of expert {index}, and {experts_path} has {experts.num_experts}: it is of another base."
            )
        return ExpertLinear(experts, index, part)

    def router_linear(self, path: str) -> RouterLinear | None:
        """None if the path doesn't mean a mixture's router."""
        if path not in self.modules and path.rpartition(".")[2] in _ROUTERS:
            renamings, _ = self._conversions
            path = rename_source_key(f"{path}.weight", renamings, [])[0].removesuffix(".weight")
        return find_router_linear(self.modules[path]) if path in self.modules else None

    def _locate(self, owner: str, name: str) -> tuple[str, str] | None:
        """(path of the experts module, part of it) that OWNER.j.NAME means, for any j."""
        module: Any = self.modules.get(owner)
        if is_fused(module):
            check_fused(module, owner)
            whole = ("gate_up_proj", "gate_proj", "up_proj") if module.has_gate else ("up_proj",)
            return (owner, name) if name in (*whole, "down_proj") else None
        if module is not None and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            return owner, name  # experts of another form, which expert_linear refuses by name
        return self._locate_old_name(owner, name)

    def _locate_old_name(self, owner: str, name: str) -> tuple[str, str] | None:
        """The same for a name from before experts were fused, by the table with which transformers loads
        checkpoints."""
        renamings, converters = self._conversions
        key, pattern = rename_source_key(f"{owner}.0.{name}.weight", renamings, converters)
        if pattern is None:
            return None
        converter = next(c for c in converters if pattern in c.source_patterns)
        experts_path, _, parameter = key.rpartition(".")
        kinds = [type(operation) for operation in converter.operations]
        number = converter.source_patterns.index(pattern)
        if experts_path not in self.modules:
            return None
        if kinds == [MergeModulelist]:  # one old layer per expert, stacked
            part = parameter
        elif kinds == [MergeModulelist, Concatenate] and parameter == "gate_up_proj" and number < 2:
            part = ("gate_proj", "up_proj")[number]  # two old layers per expert, stacked and concatenated
        else:
            return None
        if is_fused(self.modules[experts_path]):
            check_fused(self.modules[experts_path], experts_path)
        return experts_path, part

    @cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        table = get_model_conversion_mapping(self.model) if isinstance(self.model, PreTrainedModel) else []
        return (
            [entry for entry in table if isinstance(entry, WeightRenaming)],
            [entry for entry in table if isinstance(entry, WeightConverter)],
        )
