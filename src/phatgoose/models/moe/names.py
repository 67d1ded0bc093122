"""Names of a mixture's layers: which layer a module path means, and one name for each in a pool.

transformers 4's adapters have an update for each of expert j's three linear layers; PEFT's target_parameters has one
for both halves of gate_up_proj; and a layer has an old and a new name. If a pool mixes these, its layers get the
model's own names and updates of both halves are split, so that experts that change the same weights are candidates for
the same choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
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
from phatgoose.experts.expert import Expert
from phatgoose.experts.placed import placed_expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base.module_names import plain_name
from phatgoose.models.moe.expert_linear import ExpertLinear, check_fused, gate_and_up, is_fused
from phatgoose.models.moe.stand_in import LinearStandIn, RouterLinear, find_router_linear
from phatgoose.ops.update import Update

_ROUTERS = ("gate", "router")
_HALVES = ("gate_proj", "up_proj")
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
            part = _HALVES[number]  # two old layers per expert, stacked and concatenated
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


def unify_names(model: PreTrainedModel, pool: Pool, modules: Mapping[str, nn.Module]) -> Pool:
    """The pool, with paths that mean the same weights renamed as in the model. Unchanged if there are none. Raises
    RoutingError if one expert changes the same weights twice with two gates, or its halves have other sizes than the
    model's."""
    layers = {p: m for p in pool.modules if isinstance(m := modules.get(p), LinearStandIn)}
    by_weight: dict[Any, list[str]] = {}
    for path, layer in layers.items():
        by_weight.setdefault(_weight_key(layer), []).append(path)
    mixed = [
        path for paths in by_weight.values() if _need_renaming([layers[p] for p in paths]) for path in paths
    ]
    if not mixed:
        return pool
    owners = {id(module): path for path, module in model.named_modules()}
    names = {path: _model_names(layers[path], owners) for path in mixed}
    return pool.of([_rename(expert, names, layers) for expert in pool.experts])


def _weight_key(layer: LinearStandIn) -> Any:
    """Equal for layers that share weights: gate_proj and up_proj count as parts of gate_up_proj."""
    owner = id(layer.weight_owner)
    return (owner, layer.index, layer.parameter) if isinstance(layer, ExpertLinear) else owner


def _need_renaming(layers: Sequence[LinearStandIn]) -> bool:
    """True if two of these layers of one weight are the same part, or one is both halves and another a half."""
    parts = [getattr(layer, "part", "") for layer in layers]
    return len(set(parts)) < len(parts) or ("gate_up_proj" in parts and len(parts) > 1)


def _model_names(layer: LinearStandIn, owners: Mapping[int, str]) -> tuple[str, ...]:
    """The names under which a layer's update is routed: two, if it is of both halves."""
    owner = owners[id(layer.weight_owner)]
    if not isinstance(layer, ExpertLinear):
        return (owner,)
    parts = _HALVES if layer.part == "gate_up_proj" else (layer.part,)
    return tuple(f"{owner}.{layer.index}.{part}" for part in parts)


def _rename(
    expert: Expert, names: Mapping[str, tuple[str, ...]], layers: Mapping[str, LinearStandIn]
) -> Expert:
    if names.keys().isdisjoint(expert.updates):
        return expert
    updates: dict[str, Update] = {}
    own_paths: dict[str, str] = {}
    for path, update in expert.updates.items():
        new_names = names.get(path, (path,))
        parts = _split(expert, path, update, layers[path]) if len(new_names) > 1 else (update,)
        for name, part in zip(new_names, parts, strict=True):
            if name in updates and expert.gates is not None:
                raise RoutingError(
                    f"expert {expert.name!r} changes the same weights as {own_paths[name]} and as {path}, with a gate "
                    "for each; there can be one."
                )
            updates[name] = _sum(updates[name], part) if name in updates else part
            own_paths[name] = path
    return placed_expert(expert, updates, own_paths)


def _sum(one: Update, other: Update) -> Update:
    """Both updates in one. An expert merged from an old and a new adapter has two of the same weights."""
    if not (one.is_low_rank and other.is_low_rank):
        raise RoutingError(f"{one.kind} and {other.kind} of the same weights can't be added.")
    scaled = [u.B.float() * u.scale for u in (one, other)]
    return Update(torch.cat([one.A.float(), other.A.float()]), torch.cat(scaled, dim=1))


def _split(expert: Expert, path: str, update: Update, layer: Any) -> tuple[Update, Update]:
    """An update of gate_up_proj as one of gate_proj and one of up_proj."""
    if update.d_out != layer.out_features or not update.is_low_rank:
        raise RoutingError(
            f"expert {expert.name!r} has a {update.kind} update {update.d_in} → {update.d_out} at {path}, where this "
            f"model has {layer.in_features} → {layer.out_features}."
        )
    gate, up = gate_and_up(layer.weight_owner, update.B, 0)
    return replace(update, B=gate), replace(update, B=up)
