"""PEFT's adapter format → updates. What can't be handled exactly is refused by name; nothing is dropped."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.fused import check_targets, of_parameters
from phatgoose.experts.patterns import Patterns
from phatgoose.experts.peft_rules import check_config
from phatgoose.experts.tensor_files import read_tensor_file
from phatgoose.experts.update import Update, no_rows

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, checked to be floating point and finite.

    Raises:
        ExpertError: naming the file and the tensor.
    """
    return read_tensor_file(path).tensors


@dataclass(frozen=True)
class Contents:
    """What an adapter's tensors are."""

    updates: dict[str, Update]
    """By the module's path in the base model."""
    base_copies: dict[str, Tensor]
    """Weights of the base that PEFT saved along ("lm_head.weight" → tensor): to be compared with the base's own, never used."""


def to_contents(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, drop: Collection[str] = ()
) -> Contents:
    """The update of every adapted module.

    LoRA's scale is alpha/r, or alpha/√r with rsLoRA, where rank_pattern and alpha_pattern give a module's own r and alpha.

    Raises:
        ExpertError: for a setting that isn't handled, or a tensor that is unknown, unpaired or of the wrong shape.
    """
    check_config(config, where, drop)
    found: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ExpertError(f"{where}: tensor {key!r} doesn't start with {PREFIX!r}, as PEFT's do.")
        if _dropped(key.removeprefix(PREFIX), config, drop):
            continue
        for part, pattern in _PARTS.items():
            if match := pattern.fullmatch(key, len(PREFIX)):
                _put(found.setdefault(match[1], {}), part, tensor, key, where)
                break
        else:
            if (name := _copied(key.removeprefix(PREFIX))) is None:
                raise ExpertError(
                    f"{where}: tensor {key!r} is no part of a LoRA or (IA)³ adapter; it can't be routed."
                )
            _put(copies, name, tensor, key, where)
    if not found:
        raise ExpertError(f"{where}: there is no tensor of an adapter in it.")
    if config["peft_type"] == "IA3":
        return Contents({path: _ia3(path, parts, where) for path, parts in found.items()}, copies)
    settings = _Settings(config, where)
    updates = of_parameters(found, check_targets(config, where), settings, where)
    updates |= {path: _lora(settings, path, parts, where) for path, parts in found.items()}
    return Contents(updates, copies)


def _put(into: dict[str, Tensor], name: str, tensor: Tensor, key: str, where: str) -> None:
    if name in into:
        raise ExpertError(f"{where}: tensor {key!r} stands there twice, under two names.")
    into[name] = tensor


_PARTS = {
    name: re.compile(pattern)
    for name, pattern in {
        "A": r"(.+)\.lora_A\.weight",
        "B": r"(.+)\.lora_B\.weight",
        "bias": r"(.+)\.lora_B\.bias",
        "magnitude": r"(.+)\.lora_magnitude_vector(?:\.weight)?",
        "embedding_A": r"(.+)\.lora_embedding_A",
        "embedding_B": r"(.+)\.lora_embedding_B",
        "ia3": r"(.+)\.ia3_l",
    }.items()
}
_COPIED = ("embed", "wte", "shared", "lm_head", "output")


def _copied(name: str) -> str | None:
    """The base's parameter that is saved along under this name, if it is one.

    PEFT does so with embeddings and heads: under base_layer where they are adapted, bare where the vocabulary was resized.
    """
    path, _, kind = name.rpartition(".")
    path = path.removesuffix(".base_layer")
    last = re.split(r"\W", path)[-1]
    return f"{path}.{kind}" if kind in ("weight", "bias") and any(word in last for word in _COPIED) else None


def _dropped(key: str, config: Mapping[str, Any], drop: Collection[str]) -> bool:
    """Whether a tensor belongs to what the caller asked to leave out."""
    if "trainable_token_indices" in drop and "token_adapter." in key:
        return True
    if "modules_to_save" not in drop:
        return False
    saved = config.get("modules_to_save") or ()
    # Below a module of that name: ".NAME." in ".KEY", and not at its end.
    return any(0 <= f".{key}".find(f".{name}.") < len(key) - len(name) - 1 for name in saved)


class _Settings:
    """The settings of a LoRA adapter, as PEFT resolves them for a module.

    Raises:
        ExpertError: one isn't what PEFT takes.
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
        if abs(scale) > _LARGEST:
            raise ExpertError(
                f"{self._where}: lora_alpha of module {path} is {brief(alpha)}, so its scale is {scale!r}, which no float32 holds."
            )
        return float(scale)

    def flag(self, name: str) -> bool:
        value = self._config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ExpertError(f"{self._where}: {name} is {brief(value)}, expected true or false.")
        return bool(value)

    def _number(self, patterns: str, name: str, path: str) -> float:
        value = self._patterns[patterns].find(path, self._config.get(name, 8))
        finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _HUGE
        if not finite:  # NaN as well
            raise ExpertError(
                f"{self._where}: {name} of module {path} is {brief(value)}, expected a finite number."
            )
        return value


_LARGEST = 3.4028234663852886e38
"""Of float32."""
_HUGE = 1.7976931348623157e308
"""The largest float."""


def _lora(settings: _Settings, path: str, parts: Mapping[str, Tensor], where: str) -> Update:
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
            f"{where}: ensure_weight_tying ties the update of {path} to another module's; train it without."
        )
    rank = settings.rank(path)
    a, b = (parts[name] for name in names)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ExpertError(
            f"{where}: module {path} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected [{rank}, d_in] and "
            f"[d_out, {rank}] for the configured rank {rank} (layers other than linear ones and embeddings can't be routed)."
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
                f"{where}: {setting} is {settings.flag(setting)}, and module {path} has {'a' if vectors[name] is not None else 'no'} {name}."
            )
    if vectors["bias"] is not None and vectors["magnitude"] is not None:
        raise ExpertError(
            f"{where}: module {path} has both a bias and a DoRA magnitude, which PEFT doesn't define."
        )
    return Update(
        a, b, settings.scale(path, rank), vectors["bias"], magnitude=vectors["magnitude"], embedding=embedding
    )


def _ia3(path: str, parts: Mapping[str, Tensor], where: str) -> Update:
    """PEFT keeps l as [d_out, 1] where it scales the output, bias included, and as [1, d_in] where it scales the input."""
    if parts.keys() != {"ia3"}:
        raise ExpertError(
            f"{where}: module {path} has {', '.join(sorted(parts))}; an (IA)³ adapter has one ia3_l."
        )
    vector = parts["ia3"]
    if vector.ndim != 2 or 1 not in vector.shape:
        raise ExpertError(
            f"{where}: module {path} has ia3_l {list(vector.shape)}, expected [d_out, 1] or [1, d_in]."
        )
    if vector.shape[0] == 1 and vector.shape[1] != 1:
        return Update(*no_rows(vector.shape[1], None), input_scale=vector.reshape(-1))
    if vector.shape == (1, 1):
        raise ExpertError(
            f"{where}: module {path} has an ia3_l of one value, which may scale its input or its output."
        )
    return Update(*no_rows(None, vector.shape[0]), output_scale=vector.reshape(-1))
