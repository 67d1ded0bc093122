"""An expert's gates: one vector for each adapted module, in gates.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.files.safetensors_file import check_finite
from phatgoose.experts.names import PEFT_WEIGHTS
from phatgoose.ops.update import sizes_agree

FORMAT = {"format": "phatgoose-gates", "version": "1"}


def gates_metadata(adapter_sha256: str, base: Any) -> dict[str, str]:
    """The metadata of gates.safetensors: the adapter that the gates were trained for and, if known, its base."""
    metadata = {**FORMAT, "adapter_sha256": adapter_sha256}
    if base:
        metadata["base"] = json.dumps(base, sort_keys=True)
    return metadata


def check_made_for(
    expected: Mapping[str, str],
    metadata: Mapping[str, str],
    path: Path,
    adapter_sha256: str,
    weights: str = PEFT_WEIGHTS,
) -> None:
    """Refuses a file whose metadata has another format than `expected`, or another adapter than this.

    Args:
        weights: the name of the adapter's file, which has this sha256.
    """
    if any(metadata.get(key) != value for key, value in expected.items()):
        raise ExpertError(
            f"{path} has format {brief(metadata.get('format'))} version {brief(metadata.get('version'))}; "
            f"expected {expected['format']!r} version {expected['version']!r}."
        )
    if metadata.get("adapter_sha256") != adapter_sha256:
        raise ExpertError(
            f"{path} was made with another adapter, or {weights} is damaged or was changed: expected sha256 "
            f"{brief(metadata.get('adapter_sha256'))}, found {adapter_sha256}."
        )


def check_vectors(
    shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, tuple[int, int, bool]], what: str, where: str
) -> None:
    """Refuses vectors that aren't one for each module that an expert adapts, of the size that a gate has there.

    Args:
        shapes: of the vectors, by module path.
        sizes: as `Expert.sizes`.
        what: what a vector is, as in "gate".
    """
    if missing := sorted(sizes.keys() - shapes.keys()):
        raise ExpertError(f"{where}: no {what} for module {missing[0]}, which the expert adapts.")
    if others := sorted(shapes.keys() - sizes.keys()):
        raise ExpertError(f"{where}: a {what} for module {others[0]}, which the expert doesn't adapt.")
    for path, shape in shapes.items():
        d_in, d_out, embedding = sizes[path]
        expected = d_out if embedding else d_in
        if len(shape) != 1 or not sizes_agree(shape[0], expected):
            raise ExpertError(f"{where}: {what} of {path} has shape {list(shape)}, expected [{expected}].")


def checked_gates(
    gates: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int, bool]], where: str
) -> dict[str, Tensor]:
    """The gates in float32 on the CPU, checked: finite, and one for each module that the expert adapts."""
    check_vectors({path: tuple(gate.shape) for path, gate in gates.items()}, sizes, "gate", where)
    found = {path: gate.detach().to("cpu", torch.float32) for path, gate in gates.items()}
    for path, gate in found.items():  # in float32, which holds less than float64
        check_finite(gate, f"{where}: gate of {path}")
    return found
