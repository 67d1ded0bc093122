"""Checks of a model's modules against the experts that adapt them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base.layers import dense_weight, embedding_shape, linear_shape, same_weights
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.models.moe.names import modules_by_path
from phatgoose.ops.update import sizes_agree
from phatgoose.registry import unknown


def shape_of(module: nn.Module, embedding: bool) -> tuple[int, int]:
    """(d_in, d_out) of a module that `module_at` returned; (vocabulary, d_out) of an embedding."""
    shape = embedding_shape(module) if embedding else linear_shape(module)
    assert shape is not None  # module_at has refused others
    return shape


def module_at(modules: dict[str, nn.Module], path: str, pool: Pool) -> nn.Module:
    """The model's module at `path`, checked against the updates and gates of every expert that adapts it.

    Raises:
        RoutingError: the model has no such module, or one of another kind or shape, or a gate has another length.
    """
    owner = next(e for e in pool.experts if path in e.sizes)
    if path not in modules:
        raise RoutingError(
            f"expert {owner.name!r} adapts a module this model lacks: {unknown('module', path, modules)}"
        )
    module, embedding = modules[path], owner.sizes[path][2]
    shape = embedding_shape(module) if embedding else linear_shape(module)
    if shape is None:
        wanted = "plain embeddings" if embedding else "linear layers"
        raise RoutingError(
            f"expert {owner.name!r} adapts {path}, a {type(module).__name__}; only {wanted} can be routed in this way."
        )
    for expert in pool.experts:
        size = expert.sizes.get(path)
        if size is None:
            continue
        if not all(map(sizes_agree, size[:2], shape)):
            raise RoutingError(
                f"expert {expert.name!r} has an update {size[0]} → {size[1]} at {path}, where this model has "
                f"{shape[0]} → {shape[1]}."
            )
        gate, wanted_length = (expert.gates or {}).get(path), shape[1] if embedding else shape[0]
        if gate is not None and gate.shape[0] != wanted_length:
            raise RoutingError(
                f"expert {expert.name!r} has a gate of {gate.shape[0]} values at {path}, where this model needs "
                f"{wanted_length}."
            )
    return module


def check_parameters(modules: Mapping[str, nn.Module], experts: Iterable[Expert]) -> None:
    """Refuses adapters of PEFT's `target_parameters` whose layout isn't that of this model's parameters.

    Raises:
        RoutingError: they are for another number of experts; or the layout may be that of an earlier PEFT, and the
            sizes don't say.
    """
    for expert in experts:
        if not (targets := expert.adapter_config.get("target_parameters")):
            continue
        numbers: dict[tuple[str, str], int] = {}
        for path in expert.sizes:
            module = modules.get(path)
            if isinstance(module, ExpertLinear):
                owner, _, name = path.rpartition(".")
                key = owner.rpartition(".")[0], name
                numbers[key] = max(numbers.get(key, 0), module.index + 1)
                _check_layout(expert, path, module)
            elif isinstance(module, Conv1D) and any(f".{path}.weight".endswith(f".{t}") for t in targets):
                raise RoutingError(
                    f"expert {expert.name!r} adapts {path}.weight as a bare parameter, of a layer whose weight lies "
                    "transposed; name the module in target_modules instead."
                )
        for (owner, name), number in numbers.items():
            first: Any = modules[f"{owner}.0.{name}"]
            if number != (wanted := first.weight_owner.num_experts):
                raise RoutingError(
                    f"expert {expert.name!r} changes {number} experts in {owner}.{name}, where this model has {wanted}."
                )


def _check_layout(expert: Expert, path: str, slot: ExpertLinear) -> None:
    version = str(expert.adapter_config.get("peft_version") or "0").split(".")
    early = not version[0].isdigit() or (
        int(version[0]),
        int("".join(filter(str.isdigit, version[1:2])) or 0),
    ) < (0, 19)
    if early and slot.in_features == slot.out_features and not slot.weight_owner.is_transposed:
        raise RoutingError(
            f"expert {expert.name!r} was saved by a PEFT before 0.19, which took {path} for its transpose; as it is "
            "square, its tensors don't say which they are. Train it with a later PEFT."
        )


def check_copies(modules: dict[str, nn.Module], experts: Iterable[Expert]) -> None:
    """Refuses experts that bring a changed copy of a base weight, which routing would silently leave out.

    Raises:
        RoutingError: naming the expert and the weight.
    """
    for expert in experts:
        for key, copy in expert.base_copies.items():
            path, _, name = key.rpartition(".")
            if path not in modules or not same_weights(modules[path], name, copy, cut=True):
                raise RoutingError(
                    f"expert {expert.name!r} brings its own {key} {list(copy.shape)}, which is not this model's: its "
                    "vocabulary was resized or its embeddings were retrained, and that can't be routed. To leave "
                    "them out, knowing that the expert then computes something else, make it again with "
                    "drop=['modules_to_save'] (--drop modules_to_save). If they weren't changed, it is of another "
                    "base."
                )


def weight_norms(model: PreTrainedModel, paths: Iterable[str]) -> dict[str, float]:
    """Frobenius norms of these modules' weights, without packed ones that can't be unpacked."""
    found = {}
    modules = modules_by_path(model, paths)
    for path in paths:
        try:
            weight = dense_weight(modules[path], path)
        except RoutingError:
            continue
        found[path] = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
    return found
