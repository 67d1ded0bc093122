"""AdapterHub's format (the `adapters` library): bottleneck adapters → updates, and back.

What can't be computed exactly is refused by name. The library puts an adapter between a block's output y and
the residual addition y + h. In models with layer norms before their blocks, that is an addition to y, which is
the output of the block's last linear layer: y + h + s·(U f(D x + d) + u₀), where x is y (Houlsby et al. 2019),
y + h (Pfeiffer et al. 2021) or h (parallel, He et al. 2021).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.adapterhub_layers import FAMILIES, Family, Location
from phatgoose.experts.adapters.adapterhub_rules import check_settings
from phatgoose.experts.adapters.peft import Contents
from phatgoose.experts.files.safetensors_file import identical
from phatgoose.ops.bottleneck import Bottleneck
from phatgoose.ops.update import Update, no_rows

ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_new", "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_python_tanh": "gelu_new",
    "quick_gelu": "quick_gelu",
    "silu": "silu", "swish": "silu", "mish": "mish", "hardswish": "hardswish", "tanh": "tanh", "sigmoid": "sigmoid",
    "leakyrelu": "leakyrelu", "leaky_relu": "leakyrelu", "relu6": "relu6", "relu2": "relu2", "linear": "identity",
}  # fmt: skip
"""The library's names (those of transformers' ACT2FN, and its own "leakyrelu") → those of
`ops.bottleneck.ACTIVATIONS`."""
# What configs without a version mean by these names.
_BEFORE_VERSIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_PARTS = {
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "adapter_norm_before.weight": "norm_weight",
    "adapter_norm_before.bias": "norm_bias",
    "scaling": "scaling",
}


def to_contents(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Contents:
    """The update of every adapted module.

    Raises:
        ExpertError: an architecture or a setting isn't handled, or a tensor is unknown, missing or of the wrong shape.
    """
    settings, family = check_settings(config, where), _family(config, where)
    found = _grouped(family, settings, config, tensors, where)
    for location in family.locations:
        if settings[location.setting] and location not in [place for place, _ in found]:
            raise ExpertError(
                f"{where}: {location.setting} is true in its config, but it has no tensors for it."
            )
    if not found:
        raise ExpertError(f"{where}: it holds no tensors of an adapter.")
    updates = {}
    for (location, layer), parts in found.items():
        path = f"{layer}.{location.module}"
        bottleneck = _bottleneck(settings, config, parts, f"{where}: the adapter at {path}")
        if settings["is_parallel"] or settings["original_ln_before"]:
            bottleneck = replace(
                bottleneck, residual=f"{layer}.{location.residual}", reads_output=not settings["is_parallel"]
            )
        updates[path] = Update(*no_rows(None, bottleneck.down.shape[1]), bottleneck=bottleneck)
    return Contents(updates, {})


def to_tensors(updates: Mapping[str, Update], model_type: str, name: str) -> dict[str, Tensor]:
    """The library's tensors of bottleneck updates by module path, for an adapter of this name."""
    tensors = {}
    for path, update in updates.items():
        place, b = FAMILIES[model_type].at(path), update.bottleneck
        assert place is not None
        assert b is not None
        location, layer = place
        for part, tensor in (
            ("adapter_down.0.weight", b.down), ("adapter_down.0.bias", b.down_bias), ("adapter_up.weight", b.up),
            ("adapter_up.bias", b.up_bias),
        ):  # fmt: skip
            assert tensor is not None
            tensors[f"{layer}.{location.container}adapters.{name}.{part}"] = tensor
    return tensors


def _family(config: Mapping[str, Any], where: str) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ExpertError(
            f"{where}: model_type is {brief(kind)}. Where AdapterHub puts adapters is known for {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def _grouped(
    family: Family,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
) -> dict[tuple[Location, str], dict[str, Tensor]]:
    """The parts of each adapter, by location and the layer's path in the base."""
    found: dict[tuple[Location, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        location, layer, part = _place(family, key, config.get("name"), bool(settings["ln_before"]), where)
        if not settings[location.setting]:
            raise ExpertError(
                f"{where}: there is a tensor {brief(key)}, but {location.setting} is false in its config."
            )
        # The adapter's own layer norm stands twice in the library's state dict.
        if not identical(found.setdefault((location, layer), {}).setdefault(part, tensor), tensor):
            raise ExpertError(
                f"{where}: tensor {brief(key)} and another of its layer are the same part and differ."
            )
    return found


def _place(family: Family, key: str, name: Any, normed: bool, where: str) -> tuple[Location, str, str]:
    """The location that a tensor belongs to, its layer's path in the base, and which part it is."""
    # An adapter saved from the bare model has no prefix; one saved from a T5 with the library's own heads
    # has "transformer.".
    bare = key.removeprefix(family.prefix or "transformer.")
    for location in family.locations:
        pattern = rf"({location.layer})\.{re.escape(location.container)}adapters\.([^.]+)\.(.+)"
        if (match := re.fullmatch(pattern, bare)) is None:
            continue
        if match[2] != name:
            raise ExpertError(
                f"{where}: tensor {brief(key)} belongs to an adapter {brief(match[2])}, and the config to "
                f"{brief(name)}."
            )
        if part := _part(match[3], normed):
            return location, family.prefix + match[1], part
    raise ExpertError(
        f"{where}: tensor {brief(key)} is no part of a bottleneck adapter of this architecture, so it can't "
        "be routed. If an old version of the library wrote it, load and save it with a current one."
    )


def _part(name: str, normed: bool) -> str | None:
    down = re.fullmatch(r"adapter_down\.([01])\.(weight|bias)", name)
    if down is None:
        return _PARTS.get(name)
    suffix = "" if down[2] == "weight" else "_bias"
    if down[1] == str(int(normed)):
        return f"down{suffix}"
    return f"norm_{down[2]}" if normed else None


def _bottleneck(
    settings: Mapping[str, Any], config: Mapping[str, Any], parts: Mapping[str, Tensor], where: str
) -> Bottleneck:
    wanted = {"down", "down_bias", "up", "up_bias"}
    wanted |= {"norm_weight", "norm_bias"} if settings["ln_before"] else set()
    wanted |= {"scaling"} if isinstance(settings["scaling"], str) else set()
    if parts.keys() != wanted:
        missing, other = sorted(wanted - parts.keys()), sorted(parts.keys() - wanted)
        raise ExpertError(
            f"{where} lacks {', '.join(missing) or 'nothing'} and has {', '.join(other) or 'nothing'} beyond "
            "its config."
        )
    r, d = parts["down_bias"].numel(), parts["up_bias"].numel()
    learned = (1,) if settings["scaling"] == "learned" else (d,)
    shapes = {
        "down": (r, d), "down_bias": (r,), "up": (d, r), "up_bias": (d,), "norm_weight": (d,), "norm_bias": (d,),
        "scaling": learned,
    }  # fmt: skip
    if (hidden := config.get("hidden_size")) is not None and hidden != d:
        raise ExpertError(f"{where} writes {d} values, and hidden_size is {brief(hidden)} in its config.")
    for part, tensor in parts.items():
        if tuple(tensor.shape) != shapes[part] or not tensor.numel():
            raise ExpertError(
                f"{where} has a {part} of shape {list(tensor.shape)}, expected {list(shapes[part])}."
            )
    up, up_bias, scale = parts["up"], parts["up_bias"], settings["scaling"]
    if isinstance(scale, str):  # one learned number, or one a channel: `up` is multiplied by it
        factor = parts["scaling"].float()
        up, up_bias, scale = factor[:, None] * up.float(), factor * up_bias.float(), 1.0
    return Bottleneck(
        parts["down"], up, parts["down_bias"], up_bias, _activation(settings, config, where), float(scale),
        parts.get("norm_weight"), parts.get("norm_bias"),
    )  # fmt: skip


def _activation(settings: Mapping[str, Any], config: Mapping[str, Any], where: str) -> str:
    name = settings.get("non_linearity")  # the library has no default for it
    if isinstance(name, str) and "version" not in config:
        name = _BEFORE_VERSIONS.get(name, name)
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise ExpertError(
            f"{where}: non_linearity is {brief(name)}; computed exactly: {', '.join(sorted(ACTIVATIONS))}."
        )
    return ACTIVATIONS[name.lower()]
