"""AdapterHub's format (the `adapters` library): bottleneck adapters → updates, and back.

What can't be computed exactly is refused by name, with an ExpertError. The library puts an adapter between a block's
output y and the residual addition y + h. In models with layer norms before their blocks, that is an addition to y,
which is the output of the block's last linear layer: y + h + s·(U f(D x + d) + u₀), where x is y (Houlsby et al. 2019),
y + h (Pfeiffer et al. 2021) or h (parallel, He et al. 2021).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft import Contents
from phatgoose.experts.adapters.peft_rules import ADAPTERHUB_RULES, check_rules
from phatgoose.experts.adapters.tensors import Shape, check_tensors
from phatgoose.experts.files.safetensors_file import identical
from phatgoose.experts.names import INTERFACE_FILE
from phatgoose.ops.bottleneck import Bottleneck
from phatgoose.ops.update import Update, no_rows


@dataclass(frozen=True)
class Location:
    """One place for adapters in every layer of an architecture."""

    setting: str
    """The setting that puts adapters there."""
    layer: str
    """Pattern of the layer's path, without the family's prefix."""
    container: str
    """What stands between the layer's path and `adapters.NAME` in a tensor's key."""
    module: str
    """The linear layer whose output is y, below the layer's path."""
    residual: str
    """The module whose input is h, below the layer's path."""


@dataclass(frozen=True)
class Family:
    """Where the library puts adapters in one architecture."""

    prefix: str
    """Path of the stack of layers in a model with a language modelling head."""
    locations: tuple[Location, ...]
    has_interface: bool
    """Whether adapters may come with an interface that names the layers."""

    def at(self, path: str) -> tuple[Location, str] | None:
        """The location whose module is at this path of the base, and its layer's path."""
        for location in self.locations:
            layer = path.removesuffix(f".{location.module}")
            if layer != path and re.fullmatch(re.escape(self.prefix) + f"(?:{location.layer})", layer):
                return location, layer
        return None


_DATA = tomllib.loads(files("phatgoose.experts.adapters").joinpath("adapterhub.toml").read_text("utf-8"))
ACTIVATIONS: dict[str, str] = _DATA["activations"]
"""The library's names → those of `ops.bottleneck.ACTIVATIONS`."""
FAMILIES = {
    model_type: Family(
        one["prefix"],
        tuple(Location(**location) for location in one["locations"]),
        one.get("has_interface", False),
    )
    for one in _DATA["families"]
    for model_type in one["model_types"]
}
"""By the config's model_type."""


def places(model_type: str, settings: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """Module paths that get an adapter with these settings → the module whose input is the residual stream there."""
    family = FAMILIES[model_type]
    found = {path: family.at(path) for path in paths}
    return {
        path: f"{place[1]}.{place[0].residual}"
        for path, place in found.items()
        if place is not None and settings[place[0].setting]
    }


def to_contents(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Contents:
    """The update of every adapted module."""
    settings, family = _checked_settings(config, where), _family(config, where)
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


def check_interface(interface: Any, config: Mapping[str, Any], where: str) -> None:
    """Refuses an adapter that was trained through a custom interface which puts adapters elsewhere."""
    given = interface.get("interface") if isinstance(interface, dict) else None
    family = FAMILIES.get(str(config.get("model_type")))
    if not isinstance(given, dict) or family is None or not family.has_interface:
        raise ExpertError(f"{where}: its {INTERFACE_FILE} isn't that of a known architecture.")
    for key, name in _DATA["interface"].items():
        if given.get(key) != (name or None):
            raise ExpertError(
                f"{where}: it was trained through a custom interface, with {key} = {brief(given.get(key))} "
                f"(expected {name or None!r}): where that puts adapters isn't known."
            )


def _checked_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings in an adapter's config, defaults filled in; what isn't handled exactly is refused by name."""
    given = config.get("config")
    if not isinstance(given, Mapping):
        raise ExpertError(f"{where}: config is {brief(given)}; expected an adapter's settings.")
    check_rules(given, ADAPTERHUB_RULES, where, empty=())
    settings = {**_DATA["defaults"], **given}
    for key in _DATA["booleans"]:
        if not isinstance(settings.get(key), bool):
            raise ExpertError(f"{where}: {key} is {brief(settings.get(key))}, expected true or false.")
    scaling = settings["scaling"]
    number = isinstance(scaling, int | float) and not isinstance(scaling, bool) and abs(scaling) < 1e30
    if not number and scaling not in ("learned", "channel"):
        raise ExpertError(f"{where}: scaling is {brief(scaling)}, expected a number, 'learned' or 'channel'.")
    _check_sum(settings, where)
    return settings


def _check_sum(settings: Mapping[str, Any], where: str) -> None:
    """The block must give y + h + adapter(…), with y and h once each. Some settings drop h or add it twice."""
    before, after, own = (
        settings[k] for k in ("original_ln_before", "original_ln_after", "residual_before_ln")
    )
    if settings["is_parallel"]:
        before, own = False, True
    if not isinstance(own, bool):
        raise ExpertError(
            f"{where}: residual_before_ln = {brief(own)}: the library doesn't define it for models whose "
            "layer norms stand before their blocks."
        )
    inside = before and not own  # whether the adapter's own residual connection brings h along
    if inside == after:
        raise ExpertError(
            f"{where}: original_ln_before = {before}, residual_before_ln = {own} and original_ln_after = "
            f"{after} together {'add the residual stream twice' if after else 'drop the residual stream'}, "
            "so the adapter is no addition to the base."
        )


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
        part: str | None = _DATA["parts"].get(name)
        return part
    suffix = "" if down[2] == "weight" else "_bias"
    if down[1] == str(int(normed)):
        return f"down{suffix}"
    return f"norm_{down[2]}" if normed else None


def _bottleneck(
    settings: Mapping[str, Any], config: Mapping[str, Any], parts: Mapping[str, Tensor], where: str
) -> Bottleneck:
    scale = settings["scaling"]
    shapes: dict[str, Shape] = {"down": ("r", "d"), "down_bias": ("r",), "up": ("d", "r"), "up_bias": ("d",)}
    if settings["ln_before"]:
        shapes |= {"norm_weight": ("d",), "norm_bias": ("d",)}
    if isinstance(scale, str):
        shapes["scaling"] = (1,) if scale == "learned" else ("d",)
    check_tensors(parts, shapes, where)
    up, up_bias = parts["up"], parts["up_bias"]
    if (hidden := config.get("hidden_size")) is not None and hidden != len(up):
        raise ExpertError(
            f"{where} writes {len(up)} values, and hidden_size is {brief(hidden)} in its config."
        )
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
        name = _DATA["before_versions"].get(name, name)
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise ExpertError(
            f"{where}: non_linearity is {brief(name)}; computed exactly: {', '.join(sorted(ACTIVATIONS))}."
        )
    return ACTIVATIONS[name.lower()]
