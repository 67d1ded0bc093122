"""PEFT's target_parameters → updates: LoRA of a mixture's 3-D parameters.

Such a parameter holds one linear layer of each of the mixture's E experts. PEFT keeps lora_A [r·E, d_in],
expert after expert, and lora_B [d_out, r·E], in which the expert changes fastest. It wraps the module once for
each parameter, so the first parameter's tensors are under the most `base_layer`s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_lora import Settings
from phatgoose.ops.update import Update

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""3-D parameters that can be routed, in the order in which modules have them."""
MOST_EXPERTS = 4096
_WRAPPED = ".base_layer"
_PART = re.compile(rf"(.+)\.\d+\.(?:{'|'.join(PARAMETERS)})")


def check_targets(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The setting `target_parameters`, sorted; () if it is absent.

    Raises:
        ExpertError: it isn't a list of names, or it names a parameter that can't be routed.
    """
    names = config.get("target_parameters") or []
    if not isinstance(names, list) or len(names) > 1000 or not all(isinstance(n, str) and n for n in names):
        raise ExpertError(f"{where}: target_parameters = {brief(names)}, expected a list of names.")
    for name in names:
        if name.rpartition(".")[2] not in (*PARAMETERS, "weight"):
            raise ExpertError(
                f"{where}: target_parameters names {brief(name)}. Only {', '.join(PARAMETERS)} of a "
                "mixture's experts and the weight of a linear layer can be routed."
            )
    return tuple(sorted(set(names)))


def of_parameters(
    found: dict[str, Mapping[str, Tensor]], targets: tuple[str, ...], settings: Settings, where: str
) -> dict[str, Update]:
    """Removes what belongs to bare parameters from `found` (module path → its tensors), and returns it as updates.

    Each expert's part of a 3-D parameter becomes an update of its own, at MODULE.INDEX.PARAMETER.

    Raises:
        ExpertError: tensors don't fit the parameters that the config names.
    """
    updates: dict[str, Update] = {}
    if not targets:
        return updates
    modules: dict[str, list[str]] = {}  # each module's wrappers, the outermost first
    for path in sorted(found, key=len):
        modules.setdefault(_unwrapped(path), []).append(path)
    for module, paths in modules.items():
        names = _named(module, targets, len(paths))
        if not names or _is_linear(module, targets, [found[p] for p in paths], settings):
            continue
        if [p.removeprefix(module) for p in paths] != [_WRAPPED * i for i in range(len(names))]:
            raise ExpertError(
                f"{where}: {module} has tensors of {len(paths)} parameters, where target_parameters names "
                f"{', '.join(names)}."
            )
        for path, name in zip(paths, reversed(names), strict=True):
            updates |= _split(found.pop(path), module, name, settings, where)
    return updates


def owner_of(path: str) -> str | None:
    """The module with the 3-D parameter that an update at `path` is a part of; None if the path has another form."""
    match = _PART.fullmatch(path)
    return None if match is None else match[1]


def _unwrapped(path: str) -> str:
    while path.endswith(_WRAPPED):
        path = path.removesuffix(_WRAPPED)
    return path


def _named(module: str, targets: tuple[str, ...], number: int) -> list[str]:
    """The parameters of a module that `targets` mean, in the module's order; `number` of them have tensors.

    A name without a module may mean any module's parameter, so names with this module count first.
    """
    ends = [t.rpartition(".") for t in targets]
    own = {name for owner, _, name in ends if owner and f".{module}".endswith(f".{owner}")}
    names = own if len(own) == number else own | {name for owner, _, name in ends if not owner}
    return sorted(names, key=[*PARAMETERS, "weight"].index)


def _is_linear(
    module: str, targets: tuple[str, ...], wrappers: list[Mapping[str, Tensor]], settings: Settings
) -> bool:
    """Whether the tensors are an ordinary linear layer's: a name without a module doesn't exclude that."""
    owners = [owner for t in targets if (owner := t.rpartition(".")[0])]
    if len(wrappers) > 1 or any(f".{module}".endswith(f".{owner}") for owner in owners):
        return False
    a = wrappers[0].get("A")
    return a is None or a.shape[0] == settings.rank(module)


def _split(
    parts: Mapping[str, Tensor], module: str, name: str, settings: Settings, where: str
) -> dict[str, Update]:
    path = f"{module}.{name}"
    if parts.keys() != {"A", "B"} or settings.flag("use_dora") or settings.flag("lora_bias"):
        raise ExpertError(
            f"{where}: parameter {path} has {', '.join(sorted(parts))}; for bare parameters PEFT defines "
            "plain LoRA only, without use_dora and lora_bias."
        )
    a, b, rank = parts["A"], parts["B"], settings.rank(path)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank or not a.shape[0]:
        raise ExpertError(
            f"{where}: parameter {path} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected "
            f"[{rank}·E, d_in] and [d_out, {rank}·E] for E experts and the configured rank {rank}."
        )
    scale, number = settings.scale(path, rank), a.shape[0] // rank
    if name == "weight":
        if number != 1:
            raise ExpertError(f"{where}: parameter {path} has tensors of rank {a.shape[0]}, expected {rank}.")
        return {module: Update(a, b, scale)}
    if number > MOST_EXPERTS:
        raise ExpertError(
            f"{where}: parameter {path} has tensors of {number} experts; expected at most {MOST_EXPERTS}."
        )
    each = zip(a.reshape(number, rank, -1), b.reshape(b.shape[0], rank, number).unbind(2), strict=True)
    return {f"{module}.{j}.{name}": Update(a_j, b_j, scale) for j, (a_j, b_j) in enumerate(each)}
