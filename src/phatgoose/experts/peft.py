"""PEFT's adapter format → updates. What can't be handled exactly is refused by name; nothing is dropped."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError
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
                found.setdefault(match[1], {})[part] = tensor
                break
        else:
            if match := _COPY.fullmatch(key, len(PREFIX)):
                copies[f"{match[1]}.{match[2]}"] = tensor
                continue
            raise ExpertError(
                f"{where}: tensor {key!r} is no part of a LoRA or (IA)³ adapter; it can't be routed."
            )
    if not found:
        raise ExpertError(f"{where}: there is no tensor of an adapter in it.")
    build = _ia3 if config["peft_type"] == "IA3" else _lora
    return Contents({path: build(config, path, parts, where) for path, parts in found.items()}, copies)


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
# PEFT saves embeddings and heads along: under base_layer where they are adapted, bare where the vocabulary was resized.
_COPY = re.compile(r"(.*?(?:embed|wte|shared|lm_head|embed_out|output)\w*)(?:\.base_layer)?\.(weight|bias)")


def _dropped(key: str, config: Mapping[str, Any], drop: Collection[str]) -> bool:
    """Whether a tensor belongs to what the caller asked to leave out."""
    if "trainable_token_indices" in drop and "token_adapter." in key:
        return True
    saved = config.get("modules_to_save") or ()
    return "modules_to_save" in drop and any(
        re.fullmatch(rf"(?:.*\.)?{re.escape(n)}\..+", key) for n in saved
    )


def _lora(config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], where: str) -> Update:
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
    if embedding and config.get("ensure_weight_tying"):
        raise ExpertError(
            f"{where}: ensure_weight_tying ties the update of {path} to another module's; train it without."
        )
    rank = int(_setting(config, "rank_pattern", "r", path, where))
    alpha = _setting(config, "alpha_pattern", "lora_alpha", path, where)
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
        if not embedding and bool(config.get(setting)) != (vectors[name] is not None):
            raise ExpertError(
                f"{where}: {setting} is {bool(config.get(setting))}, and module {path} has {'a' if vectors[name] is not None else 'no'} {name}."
            )
    if vectors["bias"] is not None and vectors["magnitude"] is not None:
        raise ExpertError(
            f"{where}: module {path} has both a bias and a DoRA magnitude, which PEFT doesn't define."
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Update(a, b, float(scale), vectors["bias"], magnitude=vectors["magnitude"], embedding=embedding)


def _ia3(config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], where: str) -> Update:
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


def _setting(config: Mapping[str, Any], pattern_key: str, default_key: str, path: str, where: str) -> float:
    """A per-module setting as PEFT resolves it: the first pattern that matches the end of the path, else the default."""
    value = config.get(default_key, 8)
    for pattern, special in (config.get(pattern_key) or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as cause:
            raise ExpertError(
                f"{where}: {pattern_key} has {pattern!r}, which is not a regular expression: {cause}"
            ) from cause
        if matched:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ExpertError(f"{where}: {default_key} of module {path} is {value!r}, expected a finite number.")
    if default_key == "r" and (value != int(value) or value < 1):
        raise ExpertError(f"{where}: rank of module {path} is {value!r}, expected a positive whole number.")
    return value
