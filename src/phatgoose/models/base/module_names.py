"""Module path → where the module sits: its block, its kind, and whose tokens it reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Names of cross-attention modules in T5, BART and others.
_NAMES = r"(?:EncDecAttention|encoder_attn|cross_?attn|cross_?attention|encoder_decoder_attention)"
_CROSS = re.compile(rf"(?:^|\.){_NAMES}(?:\.|$)")
_KEYS_VALUES = re.compile(
    rf"(?:^|\.){_NAMES}\.(?:.*\.)?(?:[kv]|[kv]_proj|key|value|c_attn|key_proj|value_proj)$"
)


@dataclass(frozen=True)
class ModuleLocation:
    """Where one module sits in its model."""

    path: str
    reads: str = "decoder"
    """Whose tokens it reads: "encoder" or "decoder"."""
    part: str = "decoder"
    """"encoder", "decoder" or "cross-attention" (whose keys and values read the encoder's tokens)."""
    layer: int | None = None
    """Number of its block; None outside of the blocks."""
    kind: str = ""
    """Its path within the block, e.g. "mlp.up_proj"."""


def reads_encoder(path: str) -> bool:
    """True if the module at `path`, by its name, computes keys or values of cross-attention."""
    return _KEYS_VALUES.search(path) is not None


def plain_name(path: str) -> str:
    """The path without torch.compile's wrapper modules."""
    return path.replace("_orig_mod.", "")


def locate_modules(paths: Sequence[str], reads: Sequence[str]) -> dict[str, ModuleLocation]:
    """Module path → location. `reads[i]` says whose tokens the i-th module reads."""
    layers = layer_and_kind(paths)
    return {
        path: ModuleLocation(path, stream, "cross-attention" if _CROSS.search(path) else stream, layer, kind)
        for path, stream, (layer, kind) in zip(paths, reads, layers, strict=True)
    }


def layer_labels(locations: Mapping[str, ModuleLocation]) -> dict[str, str]:
    """Module path → label of its layer, in the order in which layers are shown (the encoder's first).

    Labels are "3", or "enc 3" and "dec 3" if the model has an encoder; "other" outside of the layers.
    """
    has_encoder = any(m.reads == "encoder" for m in locations.values())

    def label(m: ModuleLocation) -> str:
        if m.layer is None:
            return "other"
        return f"{'enc' if m.part == 'encoder' else 'dec'} {m.layer}" if has_encoder else str(m.layer)

    def order(path: str) -> tuple[bool, bool, int]:
        m = locations[path]
        return m.layer is None, m.part != "encoder", m.layer or 0

    return {path: label(locations[path]) for path in sorted(locations, key=order)}


def layer_and_kind(modules: Sequence[str]) -> list[tuple[int | None, str]]:
    """(number of the block, what is after it) for each module path, e.g. (3, "self_attn.q_proj").

    If `modules` has blocks of several stacks, the kind starts with the stack ("decoder SelfAttention.q"). A
    path without a number has no block, and is its own kind.
    """
    split = [_split(path) for path in modules]
    several = len({stack for stack, layer, _ in split if layer is not None}) > 1
    return [
        (layer, f"{stack.split('.')[0]} {rest}" if several and layer is not None else rest)
        for stack, layer, rest in split
    ]


def _split(path: str) -> tuple[str, int | None, str]:
    """(stack, number of the block, path within it)."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and i + 1 < len(parts):
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, path
