"""An expert's gates: one vector for each adapted module, in gates.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.files.safetensors_file import check_sha256
from phatgoose.experts.names import GATES_FILE, PEFT_WEIGHTS
from phatgoose.ops.update import Update, sizes_agree

GATES_VERSION = 1


def gates_metadata(adapter_sha256: str, base: Any) -> dict[str, str]:
    """The metadata of gates.safetensors: the adapter that the gates were trained for and, if known, its base."""
    metadata = {"format": "phatgoose-gates", "version": str(GATES_VERSION), "adapter_sha256": adapter_sha256}
    if base:
        metadata["base"] = json.dumps(base, sort_keys=True)
    return metadata


def check_gates_metadata(
    metadata: Mapping[str, str], path: Path, adapter_hash: str, weights: str = PEFT_WEIGHTS
) -> None:
    """Refuses gates in another format, or for another adapter than the one with this sha256."""
    if metadata.get("format") != "phatgoose-gates" or metadata.get("version") != str(GATES_VERSION):
        raise ExpertError(
            f"{path} has format {brief(metadata.get('format'))} version {brief(metadata.get('version'))}; "
            f"expected 'phatgoose-gates' version '{GATES_VERSION}'."
        )
    check_sha256(
        metadata.get("adapter_sha256"),
        adapter_hash,
        path.parent / weights,
        f"the adapter {GATES_FILE} was trained for",
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
