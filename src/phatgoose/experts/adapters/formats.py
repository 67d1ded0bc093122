"""An adapter's folder → its config and tensors, in PEFT's format or AdapterHub's."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError
from phatgoose.experts.adapters import adapterhub, peft
from phatgoose.experts.adapters.peft_rules import OTHER_WEIGHTS, check_type
from phatgoose.experts.files.safe_folder import SafeFolder
from phatgoose.experts.files.safetensors_file import TensorFile
from phatgoose.experts.names import (
    ADAPTERHUB_WEIGHTS,
    CONFIG_FILE,
    HEAD_FILES,
    INTERFACE_FILE,
    MANIFEST,
    PEFT_WEIGHTS,
    WEIGHTS_FILES,
)

CONFIG_LIMIT_BYTES = 16 * 2**20
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")


def format_of(config: Mapping[str, Any]) -> str:
    """ "PEFT" or "AdapterHub"."""
    return "AdapterHub" if "peft_type" not in config and "config" in config else "PEFT"


def weights_file(config: Mapping[str, Any]) -> str:
    """The name of the file that holds the tensors of an adapter with this config."""
    return ADAPTERHUB_WEIGHTS if format_of(config) == "AdapterHub" else PEFT_WEIGHTS


def to_contents(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, drop: Collection[str] = ()
) -> peft.Contents:
    """The update of every adapted module, in either format."""
    if format_of(config) == "AdapterHub":
        return adapterhub.to_contents(config, tensors, where)
    return peft.to_contents(config, tensors, where, drop)


def read_adapter(folder: Path, drop: Collection[str] = ()) -> tuple[dict[str, Any], TensorFile]:
    """The config and the tensors of an adapter's folder, unchanged; damaged files and values are refused by name."""
    folder = Path(folder)
    files = SafeFolder(folder)
    if not files.exists():
        raise ExpertError(
            f"{folder} is not a folder; expected an adapter's folder with {CONFIG_FILE} and "
            f"{' or '.join(WEIGHTS_FILES)}."
        )
    if not files.has(CONFIG_FILE):
        _refuse_other_folder(folder)
    config = files.read_object(CONFIG_FILE, CONFIG_LIMIT_BYTES)
    weights = weights_file(config)
    if not files.has(weights):
        for name, said in OTHER_WEIGHTS.items():
            if files.has(name):
                raise ExpertError(f"{folder} {said}")
        raise ExpertError(f"{folder / weights} does not exist.")
    if format_of(config) == "AdapterHub":
        _check_beside(files, config, drop)
        return config, files.read_tensors(weights)
    check_type(config, str(folder))  # the tensors of other kinds can't be read
    return config, files.read_tensors(weights, empty=True)


def _refuse_other_folder(folder: Path) -> None:
    """Says what a folder without adapter_config.json holds, if it is known."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as cause:
        raise ExpertError(f"{folder} can't be read: {cause.strerror}.") from cause
    if MANIFEST in names:
        raise ExpertError(
            f"{folder} is a pool. Give folders of experts in it ({folder / 'experts' / 'NAME'})."
        )
    found = [name for name in names if os.path.lexists(folder / name / CONFIG_FILE)]
    steps = sorted((int(m[1]), m[0]) for name in found if (m := _CHECKPOINT.fullmatch(name)))
    if steps:
        last = folder / steps[-1][1]
        raise ExpertError(
            f"{folder} holds no adapter itself, but a training's checkpoints: "
            f"{_few([name for _, name in steps])}. Give one of them; the last is {last}."
        )
    if found:
        raise ExpertError(
            f"{folder} holds no adapter itself, but folders with one adapter each: {_few(found)}. Give them "
            f"one by one: {' '.join(str(folder / name) for name in found[:3])}{' …' if len(found) > 3 else ''}"
        )
    if "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names):
        raise ExpertError(
            f"{folder} holds a whole model (config.json), not an adapter. If an adapter was merged into it, "
            "give the adapter from before the merge."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "")


def _check_beside(folder: SafeFolder, config: Mapping[str, Any], drop: Collection[str]) -> None:
    """Refuses what the library keeps in further files, and what would be lost without them."""
    for name in HEAD_FILES:
        if folder.has(name) and "prediction_head" not in drop:
            raise ExpertError(
                f"{folder.path} has a prediction head ({name}). The library saves one even if it wasn't "
                "trained. If it is the base's own, leave it out with drop=['prediction_head'] (--drop). A "
                "head that was trained can't be routed."
            )
    if folder.has(INTERFACE_FILE):
        interface = folder.read_json(INTERFACE_FILE, CONFIG_LIMIT_BYTES)
        adapterhub.check_interface(interface, config, str(folder.path))
