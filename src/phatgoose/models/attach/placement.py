"""Matching experts to one model: modules under other names, VeRA's matrices in its sizes.

A language model may stand alone or inside a vision-language model, and transformers 4.52 renamed the modules of the
latter. Adapters for one layout fit the other if each of their names can mean only one module of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.placed import Renamed, placed_expert
from phatgoose.experts.pool import Pool
from phatgoose.memory import available_bytes
from phatgoose.models.attach.modules import module_at
from phatgoose.models.base.layers import embedding_shape, linear_shape
from phatgoose.ops.update import Update, sizes_agree

LAYOUTS = (
    "model.",  # a language model alone, and Qwen2-VL before transformers 4.52
    "model.language_model.",
    "language_model.model.",  # before transformers 4.52
    "language_model.",
    "model.text_model.",
    "text_model.model.",
)
"""Prefixes of the names of a language model's layers."""


def pool_on_model(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], pool: Pool
) -> tuple[Pool, dict[str, dict[str, str]]]:
    """The pool under the model's names of its modules, and by expert: its own path → the model's, where they differ.

    The same object is returned if no expert changes.

    Args:
        modules: the model's modules by path.

    Raises:
        RoutingError: a module's name may mean several modules, or two of an expert's names mean one.
    """
    found = [expert_on_model(model, modules, expert) for expert in pool.experts]
    renamed = {expert.name: names for expert, names in found if names}
    if all(one is other for (one, _), other in zip(found, pool.experts, strict=True)):
        return pool, renamed
    return Pool([expert for expert, _ in found]), renamed


def expert_on_model(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], expert: Expert
) -> tuple[Expert, dict[str, str]]:
    """The expert under the model's names of its modules, and its own path → the model's, where they differ.

    Raises:
        RoutingError: as `pool_on_model`; with VeRA also if the model lacks a module.
    """
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
    for path, size in expert.sizes.items():
        if path in modules:
            continue
        found = sorted(
            name for name in _possible_modules(model, modules, path) if _sizes_match(modules[name], size)
        )
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
    own = _layer_prefix(model, modules)
    if own in LAYOUTS:
        candidates |= {own + path.removeprefix(layout) for layout in LAYOUTS if path.startswith(layout)}
    return {name for name in candidates if name in modules}


def _layer_prefix(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> str:
    """The prefix of the names of the model's own layers, beside which its input embedding stands."""
    embedding = model.get_input_embeddings()
    path = next((name for name, module in modules.items() if module is embedding), "")
    return path[: path.rfind(".") + 1]


def _sizes_match(module: nn.Module, size: tuple[int, int, bool]) -> bool:
    shape = embedding_shape(module) if size[2] else linear_shape(module)
    return shape is not None and all(map(sizes_agree, size[:2], shape))


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
        module = module_at(dict(modules), path, alone)
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
