"""An expert's gates: one vector for each adapted module, in gates.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.names import PEFT_WEIGHTS
from phatgoose.ops.update import Update, sizes_agree

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


def checked_gates(
    gates: Mapping[str, Tensor], updates: Mapping[str, Update], where: str
) -> dict[str, Tensor]:
    """The gates in float32 on the CPU, checked: one for each module that the expert adapts, of the right size, finite.

    Raises:
        ExpertError: naming the module.
    """
    for path in updates:
        if path not in gates:
            raise ExpertError(f"{where}: no gate for module {path}, which the expert adapts.")
    checked = {}
    for path, gate in gates.items():
        if path not in updates:
            raise ExpertError(f"{where}: there is a gate for module {path}, which the expert doesn't adapt.")
        expected = updates[path].gate_dim
        if gate.ndim != 1 or not sizes_agree(gate.shape[0], expected):
            raise ExpertError(f"{where}: gate of {path} has shape {list(gate.shape)}, expected [{expected}].")
        checked[path] = gate.detach().to("cpu", torch.float32)
        if not torch.isfinite(checked[path]).all():
            raise ExpertError(f"{where}: gate of {path} has values that are NaN or infinite.")
    return checked
