"""Where the `adapters` library puts bottleneck adapters in each architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.names import INTERFACE_FILE


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

    def at(self, path: str) -> tuple[Location, str] | None:
        """The location whose module is at this path of the base, and its layer's path."""
        for location in self.locations:
            layer = path.removesuffix(f".{location.module}")
            if layer != path and re.fullmatch(re.escape(self.prefix) + f"(?:{location.layer})", layer):
                return location, layer
        return None


_LLAMA = Family(
    "model.",
    (
        Location("mh_adapter", r"layers\.\d+", "attention_adapters.", "self_attn.o_proj", "input_layernorm"),
        Location(
            "output_adapter", r"layers\.\d+", "output_adapters.", "mlp.down_proj", "post_attention_layernorm"
        ),
    ),
)
_GPT2 = Family(
    "transformer.",
    (
        Location("mh_adapter", r"h\.\d+", "attention_adapters.", "attn.c_proj", "ln_1"),
        Location("output_adapter", r"h\.\d+", "output_adapters.", "mlp.c_proj", "ln_2"),
    ),
)
_T5 = Family(
    "",
    (
        Location(
            "mh_adapter", r"(?:encoder|decoder)\.block\.\d+\.layer\.0", "", "SelfAttention.o", "layer_norm"
        ),
        Location("cross_adapter", r"decoder\.block\.\d+\.layer\.1", "", "EncDecAttention.o", "layer_norm"),
        Location(
            "output_adapter",
            r"encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2",
            "",
            "DenseReluDense.wo",
            "layer_norm",
        ),
    ),
)
FAMILIES = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2, "t5": _T5, "mt5": _T5,
}  # fmt: skip
"""By the config's model_type."""


def places(model_type: str, settings: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """Module paths that get an adapter with these settings → the module whose input is the residual stream there.

    Raises:
        KeyError: it isn't known where the library puts adapters in this model_type.
    """
    family = FAMILIES[model_type]
    found = {path: family.at(path) for path in paths}
    return {
        path: f"{place[1]}.{place[0].residual}"
        for path, place in found.items()
        if place is not None and settings[place[0].setting]
    }


def check_interface(interface: Any, config: Mapping[str, Any], where: str) -> None:
    """Refuses an adapter that was trained through a custom interface which puts adapters elsewhere.

    Raises:
        ExpertError: naming what differs.
    """
    known = {
        "layer_self_attn": "self_attn", "layer_cross_attn": None, "attn_o_proj": "o_proj",
        "layer_output_proj": "mlp.down_proj", "layer_pre_self_attn": "input_layernorm",
        "layer_pre_ffn": "post_attention_layernorm", "layer_ln_1": None, "layer_ln_2": None,
    }  # fmt: skip
    given = interface.get("interface") if isinstance(interface, dict) else None
    if not isinstance(given, dict) or FAMILIES.get(str(config.get("model_type"))) is not _LLAMA:
        raise ExpertError(f"{where}: its {INTERFACE_FILE} isn't that of a known architecture.")
    for key, value in known.items():
        if given.get(key) != value:
            raise ExpertError(
                f"{where}: it was trained through a custom interface, with {key} = {brief(given.get(key))} "
                f"(expected {value!r}): where that puts adapters isn't known."
            )
