"""LoRA: its settings as PEFT resolves them, and its tensors → updates, also of 3-D parameters.

PEFT's target_parameters are bare parameters. Those that can be routed hold one linear layer of each of the mixture's E
experts. PEFT keeps lora_A [r·E, d_in], expert after expert, and lora_B [d_out, r·E], in which the expert changes
fastest. It wraps the module once for each parameter, so the first parameter's tensors are under the most `base_layer`s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_patterns import Patterns
from phatgoose.experts.adapters.tensors import Shape, check_tensors
from phatgoose.ops.update import Update

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""3-D parameters that can be routed, in the order in which modules have them."""
MOST_EXPERTS = 4096
_WRAPPED = re.compile(r"(?:\.base_layer)+$")
_PART = re.compile(rf"(.+)\.\d+\.(?:{'|'.join(PARAMETERS)})")
_LARGEST = 3.4028234663852886e38
"""The largest float32."""
_HUGE = 1.7976931348623157e308
"""The largest float."""


class Settings:
    """A LoRA adapter's settings, resolved for a module as PEFT does it."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self._where = where
        self._config = config
        self._patterns = {
            name: Patterns(config.get(name), name, where) for name in ("rank_pattern", "alpha_pattern")
        }

    def rank(self, path: str) -> int:
        return whole(self._value("rank_pattern", "r", path), 1, f"{self._where}: r of module {path}")

    def scale(self, path: str, rank: int) -> float:
        what = f"{self._where}: lora_alpha of module {path}"
        alpha = finite(self._value("alpha_pattern", "lora_alpha", path), what)
        scale = alpha / math.sqrt(rank) if self.flag("use_rslora") else alpha / rank
        return in_float32(scale, f"{what} is {brief(alpha)}")

    def flag(self, name: str) -> bool:
        value = self._config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ExpertError(f"{self._where}: {name} is {brief(value)}, expected true or false.")
        return bool(value)

    def _value(self, patterns: str, name: str, path: str) -> Any:
        return self._patterns[patterns].find(path, self._config.get(name, 8))


def finite(value: Any, what: str) -> float:
    """A number of a config, unchanged; anything else is refused."""
    if (
        not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _HUGE
    ):  # NaN as well
        raise ExpertError(f"{what} is {brief(value)}, expected a finite number.")
    return value


def whole(value: Any, least: int, what: str) -> int:
    """A whole number of a config; anything else, and what is below `least`, is refused."""
    number = finite(value, what)
    if number != int(number) or number < least:
        raise ExpertError(f"{what} is {brief(number)}, expected a whole number of at least {least}.")
    return int(number)


def in_float32(scale: float, what: str) -> float:
    """An update's scale; one that doesn't fit into float32 is refused by a message that begins with `what`."""
    if abs(scale) > _LARGEST:
        raise ExpertError(f"{what}, so its scale is {scale!r}, which doesn't fit into float32.")
    return float(scale)


def lora_update(settings: Settings, path: str, parts: Mapping[str, Tensor], where: str) -> Update:
    embedding = "embedding_A" in parts or "embedding_B" in parts
    if embedding and "magnitude" in parts:
        raise ExpertError(f"{where}: module {path}: DoRA of an embedding can't be routed.")
    if embedding and settings.flag("ensure_weight_tying"):
        raise ExpertError(
            f"{where}: ensure_weight_tying ties the update of {path} to another module's. Train it without."
        )
    rank = settings.rank(path)
    a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    shapes: dict[str, Shape] = {a: (rank, "d_in"), b: ("d_out", rank)}
    for setting, part in (("lora_bias", "bias"), ("use_dora", "magnitude")):
        if not embedding and settings.flag(setting) != (part in parts):
            raise ExpertError(
                f"{where}: {setting} is {settings.flag(setting)}, and module {path} has "
                f"{'a' if part in parts else 'no'} {part}."
            )
        if not embedding and part in parts:
            shapes[part] = ("d_out",)
    hint = f" for the configured rank {rank} (layers other than linear ones and embeddings can't be routed)"
    check_tensors(parts, shapes, f"{where}: module {path}", "lora_", hint)
    bias, magnitude = parts.get("bias"), parts.get("magnitude")
    if bias is not None and magnitude is not None:
        raise ExpertError(
            f"{where}: module {path} has both a bias and a DoRA magnitude, and PEFT doesn't define such an adapter."
        )
    scale = settings.scale(path, rank)
    return Update(parts[a], parts[b], scale, bias, magnitude=magnitude, embedding=embedding)


def check_targets(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The setting `target_parameters`, sorted; () if it is absent. Parameters that can't be routed are refused."""
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
    """
    updates: dict[str, Update] = {}
    if not targets:
        return updates
    modules: dict[str, list[str]] = {}  # each module's wrappers, the outermost first
    for path in sorted(found, key=len):
        modules.setdefault(_WRAPPED.sub("", path), []).append(path)
    for module, paths in modules.items():
        names = _named(module, targets, len(paths))
        if not names or _is_linear(module, targets, [found[p] for p in paths], settings):
            continue
        if [p.removeprefix(module) for p in paths] != [".base_layer" * i for i in range(len(names))]:
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
    number = 1 if name == "weight" else a.shape[0] // rank if a.ndim else 0
    if not 0 < number <= MOST_EXPERTS:
        raise ExpertError(
            f"{where}: parameter {path} has lora_A {list(a.shape)}, which for the configured rank {brief(rank)} are "
            f"{number} experts; expected 1 to {MOST_EXPERTS}."
        )
    rows = rank * number
    hint = f" for {number} expert{'s' * (number > 1)} and the configured rank {rank}"
    check_tensors(
        parts, {"A": (rows, "d_in"), "B": ("d_out", rows)}, f"{where}: parameter {path}", "lora_", hint
    )
    scale = settings.scale(path, rank)
    if name == "weight":
        return {module: Update(a, b, scale)}
    each = zip(a.reshape(number, rank, -1), b.reshape(b.shape[0], rank, number).unbind(2), strict=True)
    return {f"{module}.{j}.{name}": Update(a_j, b_j, scale) for j, (a_j, b_j) in enumerate(each)}
