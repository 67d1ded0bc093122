"""Module path → where the module sits: its block, its kind, and whose tokens it reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# T5's, BART's, and others' names for it.
_NAMES = r"(?:EncDecAttention|encoder_attn|cross_?attn|cross_?attention|encoder_decoder_attention)"
_CROSS = re.compile(rf"(?:^|\.){_NAMES}(?:\.|$)")
_KEYS_VALUES = re.compile(
    rf"(?:^|\.){_NAMES}\.(?:.*\.)?(?:[kv]|[kv]_proj|key|value|c_attn|key_proj|value_proj)$"
)


@dataclass(frozen=True)
class ModuleLocation:
    """One module. reads: whose tokens it sees, "encoder" or "decoder". part: "encoder", "decoder" or "cross-attention"
    (whose keys and values read the encoder's tokens). layer: number of its block or None. kind: what it is there, e.g.
    "mlp.up_proj".
    """

    path: str
    reads: str = "decoder"
    part: str = "decoder"
    layer: int | None = None
    kind: str = ""


def reads_encoder(path: str) -> bool:
    """Whether the module at `path` computes keys or values of cross-attention, by its name."""
    return _KEYS_VALUES.search(path) is not None


def plain_name(path: str) -> str:
    """The path without the modules that torch.compile has put around others."""
    return path.replace("_orig_mod.", "")


def locate_modules(paths: Sequence[str], reads: Sequence[str]) -> dict[str, ModuleLocation]:
    """The place of each module; `reads[i]` says whose tokens the i-th sees."""
    sites = layer_and_kind(paths)
    return {
        path: ModuleLocation(path, stream, "cross-attention" if _CROSS.search(path) else stream, layer, kind)
        for path, stream, (layer, kind) in zip(paths, reads, sites, strict=True)
    }


def layer_labels(where: Mapping[str, ModuleLocation]) -> dict[str, str]:
    """Each module's layer in words ("3"; "enc 3" and "dec 3" where there is an encoder; "other" outside of the layers),
    in the order in which layers are shown: the encoder's first."""
    several = any(place.reads == "encoder" for place in where.values())

    def label(place: ModuleLocation) -> str:
        if place.layer is None:
            return "other"
        return f"{'enc' if place.part == 'encoder' else 'dec'} {place.layer}" if several else str(place.layer)

    def order(path: str) -> tuple[bool, bool, int]:
        place = where[path]
        return place.layer is None, place.part != "encoder", place.layer or 0

    return {path: label(where[path]) for path in sorted(where, key=order)}


def layer_and_kind(modules: Sequence[str]) -> list[tuple[int | None, str]]:
    """(number of the block, what is after it) for each module path, e.g. (3, "self_attn.q_proj").

    Where blocks of several stacks are in `modules`, the kind starts with its stack ("decoder SelfAttention.q"). A path
    without a number has no block and is its own kind.
    """
    split = [_split(path) for path in modules]
    several = len({stack for stack, layer, _ in split if layer is not None}) > 1
    return [
        (layer, f"{stack.split('.')[0]} {rest}" if several and layer is not None else rest)
        for stack, layer, rest in split
    ]


def _split(path: str) -> tuple[str, int | None, str]:
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and place + 1 < len(parts):
            return ".".join(parts[:place]), int(part), ".".join(parts[place + 1 :])
    return "", None, path
