"""Match experts to a model: shapes, modules under other names, VeRA's matrices in its sizes.

A language model may stand alone or inside a vision-language model, and transformers 4.52 renamed the modules of the
latter. Adapters for one layout fit the other if each of their names can mean only one module of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.placed import Renamed, placed_expert
from phatgoose.experts.pool import Pool
from phatgoose.memory import available_bytes
from phatgoose.models.base.layers import dense_weight, embedding_shape, linear_shape, same_weights
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.models.moe.names import modules_by_path
from phatgoose.ops.update import Update, sizes_agree
from phatgoose.registry import unknown

LAYOUTS = (
    "model.",  # a language model alone, and Qwen2-VL before transformers 4.52
    "model.language_model.",
    "language_model.model.",  # before transformers 4.52
    "language_model.",
    "model.text_model.",
    "text_model.model.",
)
"""Prefixes of the names of a language model's layers."""


def shape_of(module: nn.Module, embedding: bool) -> tuple[int, int]:
    """(d_in, d_out) of a module that `module_at` returned; (vocabulary, d_out) of an embedding."""
    shape = _shape(module, embedding)
    assert shape is not None  # module_at has refused others
    return shape


def _shape(module: nn.Module, embedding: bool) -> tuple[int, int] | None:
    return embedding_shape(module) if embedding else linear_shape(module)


def module_at(modules: Mapping[str, nn.Module], path: str, pool: Pool) -> nn.Module:
    """The model's module at `path`, checked against the updates and gates of every expert that adapts it. Raises
    RoutingError if the model has no such module, or one of another kind or shape, or a gate has another length."""
    members = [expert for expert in pool.experts if path in expert.sizes]
    owner = members[0]
    if path not in modules:
        raise RoutingError(
            f"expert {owner.name!r} adapts a module this model lacks: {unknown('module', path, modules)}"
        )
    module, embedding = modules[path], owner.sizes[path][2]
    shape = _shape(module, embedding)
    if shape is None:
        wanted = "plain embeddings" if embedding else "linear layers"
        raise RoutingError(
            f"expert {owner.name!r} adapts {path}, a {type(module).__name__}; only {wanted} can be routed in this way."
        )
    for expert in members:
        d_in, d_out, _ = expert.sizes[path]
        if not all(map(sizes_agree, (d_in, d_out), shape)):
            raise RoutingError(
                f"expert {expert.name!r} has an update {d_in} → {d_out} at {path}, where this model has "
                f"{shape[0]} → {shape[1]}."
            )
        gate, wanted_length = (expert.gates or {}).get(path), shape[embedding]
        if gate is not None and gate.shape[0] != wanted_length:
            raise RoutingError(
                f"expert {expert.name!r} has a gate of {gate.shape[0]} values at {path}, where this model needs "
                f"{wanted_length}."
            )
    return module


def check_parameters(modules: Mapping[str, nn.Module], experts: Iterable[Expert]) -> None:
    """Refuses adapters of PEFT's `target_parameters` whose layout isn't that of this model's parameters. Raises
    RoutingError if they are for another number of experts, or their layout may be that of an earlier PEFT."""
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
    early = _peft_release(expert.adapter_config.get("peft_version")) < (0, 19)
    if early and slot.in_features == slot.out_features and not slot.weight_owner.is_transposed:
        raise RoutingError(
            f"expert {expert.name!r} was saved by a PEFT before 0.19, which took {path} for its transpose; as it is "
            "square, its tensors don't say which they are. Train it with a later PEFT."
        )


def _peft_release(found: object) -> tuple[int, ...]:
    """The numbers of a PEFT version, without what makes it a release candidate or a build of one's own; none if it
    isn't known."""
    try:
        return Version(str(found).partition("@")[0]).release  # PEFT writes "0.19.0.dev0@<commit>"
    except InvalidVersion:
        return ()


def check_copies(modules: Mapping[str, nn.Module], experts: Iterable[Expert]) -> None:
    """Refuses experts that bring a changed copy of a base weight, which routing would silently leave out. Raises
    RoutingError, naming the expert and the weight."""
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


def pool_on_model(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], pool: Pool
) -> tuple[Pool, dict[str, dict[str, str]]]:
    """The pool under the model's names of its modules, and by expert: its own path → the model's, where they differ.

    The same object is returned if no expert changes. modules: the model's, by path.

    Raises:
        RoutingError: a module's name may mean several modules, or two of an expert's names mean one.
    """
    found = [expert_on_model(model, modules, expert) for expert in pool.experts]
    renamed = {expert.name: names for expert, names in found if names}
    if all(one is other for (one, _), other in zip(found, pool.experts, strict=True)):
        return pool, renamed
    return pool.of([expert for expert, _ in found]), renamed


def expert_on_model(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], expert: Expert
) -> tuple[Expert, dict[str, str]]:
    """The expert under the model's names of its modules, and its own path → the model's, where they differ. Raises
    RoutingError as `pool_on_model` does; with VeRA also if the model lacks a module."""
    names = _renamed_modules(model, modules, expert)
    shared = any(update.shared is not None for update in expert.updates.values())
    if not names and not shared:
        return expert, {}
    paths = {names.get(path, path): path for path in expert.updates}
    updates: Mapping[str, Update] = Renamed(expert.updates, paths)
    found = placed_expert(expert, updates, paths if names else None)
    if names and expert.base_copies:
        copies = {_renamed_parameter(key, names, modules, model): t for key, t in expert.base_copies.items()}
        object.__setattr__(found, "base_copies", copies)
    if shared:
        object.__setattr__(found, "updates", _resolve_vera(modules, found))
        found.__dict__.pop("sizes", None)
    return found, names


def _renamed_modules(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], expert: Expert
) -> dict[str, str]:
    """The expert's path → the model's, where they differ. Unknown paths are left out: `module_at` refuses them."""
    names: dict[str, str] = {}
    for path, (d_in, d_out, embedding) in expert.sizes.items():
        if path in modules:
            continue
        found = [
            name
            for name in sorted(_possible_modules(model, modules, path))
            if (shape := _shape(modules[name], embedding)) and all(map(sizes_agree, (d_in, d_out), shape))
        ]
        if len(found) > 1:
            raise RoutingError(
                f"expert {expert.name!r} adapts {path}, which this model lacks; it could mean {' or '.join(found)}. "
                "Rename the adapter's keys after this model's modules."
            )
        if found:
            names[path] = found[0]
    targets = list(names.values())
    for path, target in names.items():
        if target in expert.sizes or targets.count(target) > 1:
            raise RoutingError(f"expert {expert.name!r} adapts {target} twice: once as {path}.")
    return names


def _possible_modules(model: PreTrainedModel, modules: Mapping[str, nn.Module], path: str) -> set[str]:
    """The modules that a path of another layout may mean."""
    candidates = {f"model.{path}", path.removeprefix("language_model.")}
    # The model's own layout: its layers stand beside its input embedding.
    embedding = model.get_input_embeddings()
    beside = next((name for name, module in modules.items() if module is embedding), "")
    own = beside[: beside.rfind(".") + 1]
    if own in LAYOUTS:
        candidates |= {own + path.removeprefix(layout) for layout in LAYOUTS if path.startswith(layout)}
    return {name for name in candidates if name in modules}


def _renamed_parameter(
    key: str, names: Mapping[str, str], modules: Mapping[str, nn.Module], model: PreTrainedModel
) -> str:
    """The model's name of a parameter that the expert brings a copy of."""
    path, _, kind = key.rpartition(".")
    if path in names:
        return f"{names[path]}.{kind}"
    found = {path} if path in modules else _possible_modules(model, modules, path)
    return f"{found.pop()}.{kind}" if len(found) == 1 else key


def _resolve_vera(modules: Mapping[str, nn.Module], expert: Expert) -> dict[str, Update]:
    """The expert's updates with VeRA's shared matrices cut to each module's sizes, or drawn for the largest of them."""
    alone, shapes = Pool([expert]), {}
    for path, update in expert.updates.items():
        module = module_at(modules, path, alone)
        if update.shared is not None:
            shapes[path] = linear_shape(module) or (0, 0)
    d_in, d_out = (max(widths) for widths in zip(*shapes.values(), strict=True))
    first = next(u.shared for u in expert.updates.values() if u.shared is not None)
    needed = 4 * len(first.d) * (d_in + d_out + sum(map(sum, shapes.values())))
    if needed > (free := available_bytes()):
        raise RoutingError(
            f"expert {expert.name!r} is VeRA of rank {len(first.d)}, whose matrices take {needed} bytes in this "
            f"model, and this machine has {free} bytes of memory free."
        )
    projections = first.projections.drawn(len(first.d), d_in, d_out)
    updates = {}
    for path, update in expert.updates.items():
        try:
            updates[path] = update.placed(shapes[path][0], projections) if path in shapes else update
        except ValueError as cause:
            raise RoutingError(
                f"expert {expert.name!r} at {path}: {cause}; it is of another base."
            ) from cause
    return updates


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
