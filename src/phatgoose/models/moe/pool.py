"""Give each layer of a mixture one name in a pool whose experts name it differently.

transformers 4's adapters have an update for each of expert j's three linear layers; PEFT's target_parameters has one
for both halves of gate_up_proj; and a layer has an old and a new name. If a pool mixes these, its layers get the
model's own names and updates of both halves are split, so that experts that change the same weights are candidates for
the same choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.placed import placed_expert
from phatgoose.experts.pool import Pool
from phatgoose.models.moe.expert_linear import ExpertLinear, gate_and_up
from phatgoose.models.moe.stand_in import LinearStandIn
from phatgoose.ops.update import Update

_HALVES = ("gate_proj", "up_proj")


def unify_names(model: PreTrainedModel, pool: Pool, modules: Mapping[str, nn.Module]) -> Pool:
    """The pool, with paths that mean the same weights renamed as in the model. Unchanged if there are none.

    Raises:
        RoutingError: one expert changes the same weights twice with two gates, or its halves have other sizes than the
            model's.
    """
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
    return Pool([_rename(expert, names, layers) for expert in pool.experts])


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
