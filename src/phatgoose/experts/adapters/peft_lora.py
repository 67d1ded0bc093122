"""LoRA at one module: its settings as PEFT resolves them, and its tensors → an update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_patterns import Patterns
from phatgoose.ops.update import Update


class Settings:
    """A LoRA adapter's settings, resolved for a module as PEFT does it.

    Raises:
        ExpertError: a setting isn't what PEFT takes.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self._where = where
        self._config = config
        self._patterns = {
            name: Patterns(config.get(name), name, where) for name in ("rank_pattern", "alpha_pattern")
        }

    def rank(self, path: str) -> int:
        value = self._number("rank_pattern", "r", path)
        if value != int(value) or value < 1:
            raise ExpertError(
                f"{self._where}: rank of module {path} is {brief(value)}, expected a positive whole number."
            )
        return int(value)

    def scale(self, path: str, rank: int) -> float:
        alpha = self._number("alpha_pattern", "lora_alpha", path)
        scale = alpha / math.sqrt(rank) if self.flag("use_rslora") else alpha / rank
        return in_float32(scale, f"{self._where}: lora_alpha of module {path} is {brief(alpha)}")

    def flag(self, name: str) -> bool:
        value = self._config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ExpertError(f"{self._where}: {name} is {brief(value)}, expected true or false.")
        return bool(value)

    def _number(self, patterns: str, name: str, path: str) -> float:
        value = self._patterns[patterns].find(path, self._config.get(name, 8))
        return finite(value, f"{self._where}: {name} of module {path}")


def finite(value: Any, what: str) -> float:
    """A number of a config, unchanged.

    Raises:
        ExpertError: it isn't a number, or not finite.
    """
    if (
        not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _HUGE
    ):  # NaN as well
        raise ExpertError(f"{what} is {brief(value)}, expected a finite number.")
    return value


def in_float32(scale: float, what: str) -> float:
    """An update's scale, which must fit into float32.

    Raises:
        ExpertError: it doesn't; `what` begins the message.
    """
    if abs(scale) > _LARGEST:
        raise ExpertError(f"{what}, so its scale is {scale!r}, which doesn't fit into float32.")
    return float(scale)


_LARGEST = 3.4028234663852886e38
"""The largest float32."""
_HUGE = 1.7976931348623157e308
"""The largest float."""


def lora_update(settings: Settings, path: str, parts: Mapping[str, Tensor], where: str) -> Update:
    embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    allowed = {*names} if embedding else {*names, "bias", "magnitude"}
    if unfit := parts.keys() - allowed:
        what = (
            "DoRA of an embedding can't be routed"
            if "magnitude" in unfit
            else f"unexpected: {', '.join(sorted(unfit))}"
        )
        raise ExpertError(f"{where}: module {path}: {what}.")
    for name in names:
        if name not in parts:
            raise ExpertError(f"{where}: module {path} has no lora_{name} weight.")
    if embedding and settings.flag("ensure_weight_tying"):
        raise ExpertError(
            f"{where}: ensure_weight_tying ties the update of {path} to another module's. Train it without."
        )
    rank = settings.rank(path)
    a, b = (parts[name] for name in names)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ExpertError(
            f"{where}: module {path} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected "
            f"[{rank}, d_in] and [d_out, {rank}] for the configured rank {rank} (layers other than linear "
            "ones and embeddings can't be routed)."
        )
    vectors = {name: parts.get(name) for name in ("bias", "magnitude")}
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (b.shape[0],):
            raise ExpertError(
                f"{where}: module {path} has a {name} of shape {list(vector.shape)}, expected [{b.shape[0]}]."
            )
    for setting, name in (("lora_bias", "bias"), ("use_dora", "magnitude")):
        if not embedding and settings.flag(setting) != (vectors[name] is not None):
            raise ExpertError(
                f"{where}: {setting} is {settings.flag(setting)}, and module {path} has "
                f"{'a' if vectors[name] is not None else 'no'} {name}."
            )
    if vectors["bias"] is not None and vectors["magnitude"] is not None:
        raise ExpertError(
            f"{where}: module {path} has both a bias and a DoRA magnitude, and PEFT doesn't define such an adapter."
        )
    return Update(
        a, b, settings.scale(path, rank), vectors["bias"], magnitude=vectors["magnitude"], embedding=embedding
    )
