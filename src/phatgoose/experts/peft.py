"""PEFT's adapter format → updates. What can't be handled exactly is refused by name; nothing is dropped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phatgoose.errors import ExpertError
from phatgoose.experts.update import LowRank
from phatgoose.files import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Read by us, or without any effect on what a finished adapter computes.
_HANDLED = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
}
_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "bias": "none", "modules_to_save": None, "megatron_config": None, "trainable_token_indices": None, "corda_config": None,
    "lora_ga_config": None, "use_dora": False, "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
    "monteclora_config": None, "layer_replication": None, "lora_bias": False, "target_parameters": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None,
}  # fmt: skip
_ADVICE = {
    "use_dora": "DoRA's magnitudes are not supported yet; merge the adapter into its base or train it without DoRA.",
    "lora_bias": "biases of lora_B are not supported yet.",
    "bias": "the adapter changes the base's own biases; train it with bias='none'.",
    "modules_to_save": "the adapter replaces whole modules of the base, which can't be routed token by token.",
    "trainable_token_indices": "the adapter changes token embeddings, which can't be routed token by token.",
}
# Initialisations that leave the base's weights as they were; the others (pissa, olora, …) change the base itself.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a PEFT adapter folder, as they stand on disk.

    Raises:
        ExpertError: naming the file, and the tensor, that is missing, damaged, non-finite or not floating point.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExpertError(
            f"{folder} is not a folder; expected a PEFT adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    config = read_json(folder / CONFIG_FILE, ExpertError)
    if not isinstance(config, dict):
        raise ExpertError(f"{folder / CONFIG_FILE} holds {type(config).__name__}, expected an object.")
    weights = folder / WEIGHTS_FILE
    if not weights.exists():
        pickles = [p.name for p in (folder / "adapter_model.bin", folder / "adapter_model.pt") if p.exists()]
        if pickles:
            raise ExpertError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which is refused because loading it can run code. "
                f"Load it with PEFT where you trust it and save it again with safe_serialization=True."
            )
        raise ExpertError(f"{weights} does not exist.")
    return config, read_tensors(weights)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, checked to be floating point and finite.

    Raises:
        ExpertError: naming the file and the tensor.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = file.get_tensor(name)
    except FileNotFoundError:
        raise ExpertError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as cause:
        raise ExpertError(f"{path} is not a whole safetensors file: {cause}") from cause
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ExpertError(
                f"{path}: tensor {name!r} has dtype {tensor.dtype}, expected a floating point one."
            )
        if not torch.isfinite(tensor.float()).all():
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise ExpertError(
                f"{path}: tensor {name!r} has {bad} of {tensor.numel()} values that are NaN or infinite."
            )
    return tensors


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuses by name every PEFT setting that isn't handled exactly.

    Raises:
        ExpertError: naming the setting and its value.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ExpertError(f"{where}: peft_type is {kind!r}; only 'LORA' can be routed at present.")
    for key, value in config.items():
        if key in _HANDLED or key in _NO_EFFECT:
            continue
        if key not in _DEFAULTS:
            if value in (None, False, {}, []):
                continue
            raise ExpertError(
                f"{where}: unknown setting {key} = {value!r}; it may change what the adapter computes, so it is not ignored. "
                "If it has no effect at inference, remove it from the config."
            )
        if value != _DEFAULTS[key] and not (value in ([], {}) and _DEFAULTS[key] is None):
            advice = _ADVICE.get(key, "adapters with this setting can't be routed exactly.")
            raise ExpertError(f"{where}: {key} = {value!r} (expected {_DEFAULTS[key]!r}): {advice}")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ExpertError(
            f"{where}: init_lora_weights = {init!r} changes the base's weights, so the adapter is not an update of the plain "
            "base. Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def to_updates(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, LowRank]:
    """The low-rank update of every adapted module, by the module's path in the base model.

    The scale is alpha/r, or alpha/√r with rsLoRA, where rank_pattern and alpha_pattern give a module's own r and alpha.

    Raises:
        ExpertError: for a tensor that is unknown, unpaired or of the wrong shape.
    """
    check_config(config, where)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ExpertError(
                f"{where}: tensor {key!r} is not a lora_A or lora_B weight of a linear layer; it can't be routed."
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise ExpertError(f"{where}: there is no tensor in it.")
    updates = {}
    for path, pair in halves.items():
        if missing := {"A", "B"} - pair.keys():
            raise ExpertError(f"{where}: module {path} has no lora_{missing.pop()} weight.")
        rank = _setting(config, "rank_pattern", "r", path, where)
        alpha = _setting(config, "alpha_pattern", "lora_alpha", path, where)
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ExpertError(
                f"{where}: module {path} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected [{rank}, d_in] and "
                f"[d_out, {rank}] for the configured rank {rank}."
            )
        updates[path] = LowRank(
            a, b, float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
        )
    return updates


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
