"""Map a stranger's torch file into memory: nothing is run, only tensors are accepted."""

from __future__ import annotations

import mmap
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.files import open_regular

INDEX_BYTES = 256 * 2**20
"""The largest list of a file's tensors; a million of them need about 150 MB."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def map_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a dict that torch.save wrote, in its order; their values are read when they are used.

    Anything but tensors of float32, bfloat16 or float16 on the CPU is refused.
    """
    path = Path(path)
    _check_archive(path)
    try:
        data = _load(path)
    except Exception as cause:  # torch has an error of its own for each kind of damage
        raise ExpertError(
            f"{path} can't be read as a torch file of tensors alone: {brief(str(cause), 300)} Nothing else in it "
            "is run or read."
        ) from cause
    if not isinstance(data, dict) or not data:
        raise ExpertError(f"{path} holds {type(data).__name__}, expected a dictionary of tensors by name.")
    for key, value in data.items():
        if not isinstance(key, str):
            raise ExpertError(f"{path}: {brief(key)} can't name a tensor.")
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise ExpertError(f"{path}: {brief(key)} is {type(value).__name__}, expected a tensor.")
        if value.dtype not in FLOATS or value.layout != torch.strided or value.device.type != "cpu":
            raise ExpertError(
                f"{path}: {brief(key)} is {value.dtype}, {value.layout}, on {value.device.type}; expected float32, "
                "bfloat16 or float16, in memory."
            )
    return {key: value.detach() for key, value in data.items()}


def _load(path: Path) -> Any:
    def load() -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    try:
        return load()
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
        # Linux refuses a private mapping of a file that is larger than memory, but not a shared one.
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            return load()


def _check_archive(path: Path) -> None:
    """Refuses all but an archive of uncompressed files: only these can be mapped, and have known sizes."""
    with open_regular(path, ExpertError) as (file, size):
        try:
            entries = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as cause:
            raise ExpertError(
                f"{path} is not a torch file of today's format ({cause}). If it is one of torch 1.5 or older, load "
                "it where you trust it, and save it again."
            ) from cause
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ExpertError(f"{path}: {brief(entry.filename)} is compressed, which torch.save never does.")
        if entry.file_size > (INDEX_BYTES if entry.filename.endswith(".pkl") else size):
            raise ExpertError(f"{path}: {brief(entry.filename)} has {entry.file_size} bytes.")
