"""One pool of experts that name the layers of a mixture's experts in different ways.

transformers 4's adapters have an update for each of expert j's three linear layers, target_parameters one for both halves of
gate_up_proj; and the same layer has an old and a new name. Where a pool mixes these, all of it is put under one name, and updates of
both halves are split, so that experts which change the same weights are candidates for the same choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.placed import placed_expert
from phatgoose.experts.pool import Pool
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.models.moe.router_linear import RouterLinear
from phatgoose.ops.update import Update

_HALVES = ("gate_proj", "up_proj")


def unify_names(model: PreTrainedModel, pool: Pool, modules: Mapping[str, nn.Module]) -> Pool:
    """The pool itself where no two of its paths mean the same weights; else with these under the names that the model has for them.

    Raises:
        RoutingError: one expert changes the same weights twice with gates of its own, or halves of another size than the model's.
    """
    slots = {
        path: modules[path]
        for path in pool.modules
        if isinstance(modules.get(path), ExpertLinear | RouterLinear)
    }
    together: dict[Any, dict[str, ExpertLinear | RouterLinear]] = {}
    for path, slot in slots.items():
        together.setdefault(_weights(slot), {})[path] = slot  # type: ignore[assignment]
    mixed = {path for same in together.values() if _is_mixed(same) for path in same}
    if not mixed:
        return pool
    owners = {id(module): path for path, module in model.named_modules()}
    names = {path: _names(slots[path], owners) for path in mixed}
    split = {path for path in mixed if len(names[path]) > 1}
    return Pool([_renamed(expert, names, split, slots) for expert in pool.experts])


def _weights(slot: Any) -> Any:
    """What tells whose weights these are: an expert's two halves belong together."""
    if isinstance(slot, RouterLinear):
        return id(slot.router)
    return id(slot.experts), slot.index, slot.parameter


def _is_mixed(same: Mapping[str, ExpertLinear | RouterLinear]) -> bool:
    parts = [getattr(slot, "part", "") for slot in same.values()]
    return len(set(parts)) < len(parts) or ("gate_up_proj" in parts and len(parts) > 1)


def _names(slot: Any, owners: Mapping[int, str]) -> tuple[str, ...]:
    """The names under which a slot's update is routed: two, if it is of both halves."""
    if isinstance(slot, RouterLinear):
        return (owners[id(slot.router)],)
    place = f"{owners[id(slot.experts)]}.{slot.index}"
    return tuple(f"{place}.{part}" for part in (_HALVES if slot.part == "gate_up_proj" else (slot.part,)))


def _renamed(
    expert: Expert, names: Mapping[str, tuple[str, ...]], split: set[str], slots: Mapping[str, Any]
) -> Expert:
    if names.keys().isdisjoint(expert.updates):
        return expert
    updates: dict[str, Update] = {}
    of: dict[str, str] = {}
    for path, update in expert.updates.items():
        parts = _halves(expert, path, update, slots[path]) if path in split else (update,)
        for name, part in zip(names.get(path, (path,)), parts, strict=True):
            if name in updates and expert.gates is not None:
                raise RoutingError(
                    f"expert {expert.name!r} changes the same weights as {of[name]} and as {path}, with a gate for each; there can be one."
                )
            updates[name] = _sum(updates[name], part) if name in updates else part
            of[name] = path
    return placed_expert(expert, updates, of)


def _sum(one: Update, other: Update) -> Update:
    """Both at once, as where a pool of old and new adapters was merged into one."""
    if not (one.is_low_rank and other.is_low_rank):
        raise RoutingError(f"{one.kind} and {other.kind} of the same weights can't be added.")
    scaled = [u.B.float() * u.scale for u in (one, other)]
    return Update(torch.cat([one.A.float(), other.A.float()]), torch.cat(scaled, dim=1))


def _halves(expert: Expert, path: str, update: Update, slot: ExpertLinear) -> tuple[Update, Update]:
    if update.d_out != slot.out_features or not update.is_low_rank:
        raise RoutingError(
            f"expert {expert.name!r} has a {update.kind} update {update.d_in} → {update.d_out} at {path}, where this model has "
            f"{slot.in_features} → {slot.out_features}."
        )
    parts = update.B.chunk(2) if slot.experts.is_concatenated else (update.B[::2], update.B[1::2])
    return replace(update, B=parts[0]), replace(update, B=parts[1])
