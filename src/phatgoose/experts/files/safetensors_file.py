"""Read a stranger's whole safetensors file: the header first, then the tensors, once.

It is read, not mapped into memory: a mapped file that is cut short later ends the process (SIGBUS), and one that is
changed later changes tensors that were checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from phatgoose.errors import ExpertError, PhatgooseError, brief
from phatgoose.experts.files.safetensors_header import Item, header_of
from phatgoose.files import open_regular, write_bytes
from phatgoose.memory import available_bytes

_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The content of a safetensors file, and the sha256 of the bytes that it was read from."""

    tensors: dict[str, Tensor]
    """Floating point, every value finite."""
    metadata: dict[str, str]
    sha256: str


def read_tensor_file(
    path: Path, error: type[PhatgooseError] = ExpertError, *, empty: bool = False
) -> TensorFile:
    """Reads a safetensors file.

    Args:
        empty: accept tensors without values; the caller must handle them.

    Raises:
        PhatgooseError: of the type `error`, naming the file, and the tensor if there is one: no whole safetensors
            file, not floating point, a value that isn't finite, a tensor without values, or more than fits into
            memory.
    """
    with open_regular(Path(path), error) as (file, size):
        raw, header = header_of(file, size, str(path), error)
        if header.data_bytes > (free := available_bytes()):
            raise error(
                f"{path} holds {header.data_bytes} bytes of tensors, and this machine has {free} bytes of memory free."
            )
        digest = hashlib.sha256(raw)
        tensors: dict[str, Tensor] = {}
        for name, item in header.in_order():
            where = f"{path}: tensor {name!r}"
            if 0 in item.shape and not empty:
                raise error(f"{where} has shape {list(item.shape)}, so no values.")
            tensors[name] = _read(file, item, where, error, digest)
        if file.read(1):
            raise error(f"{path} grew while it was read; is somebody writing it?")
    for name, tensor in tensors.items():
        check_finite(tensor, f"{path}: tensor {name!r}", error)
    return TensorFile(
        {name: tensors[name] for name in header.items}, dict(header.metadata), digest.hexdigest()
    )


def _read(
    file: BufferedReader, item: Item, where: str, error: type[PhatgooseError], digest: hashlib._Hash
) -> Tensor:
    try:
        tensor = torch.empty(item.shape, dtype=item.dtype)
    except (RuntimeError, MemoryError) as cause:
        raise error(f"{where}: no memory for its {item.end - item.begin} bytes.") from cause
    if not tensor.numel():
        return tensor
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    if file.readinto(view) != len(view):
        raise error(f"{where} ends early; the file was cut short while it was read.")
    digest.update(view)
    return tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    data = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(data, metadata))


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors would be written as the same bytes: dtype, shape, every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes, since torch.equal knows no float8.
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


def all_identical(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and `identical` tensors."""
    return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)


def holds_same(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bool:
    """Whether a safetensors file has just these tensors, bit for bit, and this metadata if it is given."""
    found = read_tensor_file(path, empty=True)
    return metadata in (None, found.metadata) and all_identical(found.tensors, tensors)


def check_sha256(
    expected: Any, found: str, path: Path, what: str = "", error: type[PhatgooseError] = ExpertError
) -> None:
    """Refuses a file whose sha256 isn't the expected one, which `what` recorded."""
    if expected != found:
        said = f"{what} is {brief(expected)}, the file's is" if what else f"expected sha256 {expected}, found"
        raise error(f"{path} is damaged or was changed: {said} {found}.")


def check_finite(tensor: Tensor, where: str, error: type[PhatgooseError] = ExpertError) -> None:
    """Refuses NaN and infinity. It works in pieces, so that checking a large tensor takes little memory.

    Raises:
        PhatgooseError: of the type `error`, with the number of such values.
    """
    bad = 0
    for piece in torch.split(tensor.detach().reshape(-1), _CHUNK):
        wide = piece if piece.dtype.itemsize > 1 else piece.float()  # float8 knows no isfinite
        bad += int(wide.numel() - torch.isfinite(wide).sum())
    if bad:
        raise error(f"{where} has {bad} of {tensor.numel()} values that are NaN or infinite.")
