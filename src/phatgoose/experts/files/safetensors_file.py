"""Safetensors files of strangers: the header, checked without the tensors; the tensors, read once.

They are read, not mapped into memory: a mapped file that is cut short later ends the process (SIGBUS), and one that is
changed later changes tensors that were checked. What is wrong with a file is raised as an error of the type `error`,
which names the file, and the tensor if there is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, PhatgooseError, brief
from phatgoose.files import open_regular, write_bytes
from phatgoose.memory import available_bytes
from phatgoose.strict_json import DECODER, parse_json

HEADER_LIMIT_BYTES = 32 * 2**20
NAME_LENGTH = 1000
DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""In the order in which safetensors' own writer puts tensors."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 2**24


@dataclass(frozen=True)
class Item:
    """One tensor of a file, whose bytes are [begin, end) after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Header:
    """What a safetensors file says of its tensors."""

    items: Mapping[str, Item]
    metadata: Mapping[str, str]
    data_bytes: int
    """The size of what follows the header."""

    def in_order(self) -> list[tuple[str, Item]]:
        """The tensors in the file's order."""
        return sorted(self.items.items(), key=lambda named: (named[1].begin, named[1].end))


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The content of a safetensors file, and the sha256 of the bytes that it was read from."""

    tensors: dict[str, Tensor]
    """Floating point, every value finite."""
    metadata: dict[str, str]
    sha256: str


def read_header(path: Path, error: type[PhatgooseError] = ExpertError) -> tuple[bytes, Header]:
    """A file's first bytes, up to its tensors, and the header in them; the file must be as long as the header says."""
    with open_regular(Path(path), error) as (file, size):
        return _header_of(file, size, str(path), error)


def _header_of(
    file: BufferedReader, size: int, where: str, error: type[PhatgooseError]
) -> tuple[bytes, Header]:
    """As `read_header`, of an open file of `size` bytes at its beginning; it is left at the first tensor."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    # Bounded before it is read: a stranger's file may claim any length.
    if len(first) < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
        raise error(f"{where} is not a whole safetensors file: its header can't have {length} bytes.")
    raw = first + file.read(length)
    header = parse_header(raw, where, error)
    if size != len(raw) + header.data_bytes:
        raise error(
            f"{where} is not a whole safetensors file: {len(raw) + header.data_bytes} bytes expected, {size} found."
        )
    return raw, header


def parse_header(
    raw: bytes,
    where: str,
    error: type[PhatgooseError] = ExpertError,
    known: dict[bytes, Header] | None = None,
) -> Header:
    """The header in the first bytes of a safetensors file: every dtype, shape and offset checked.

    Args:
        raw: the header with the length before it.
        known: a cache of headers by all but their metadata, since many files of a pool differ in nothing else.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise error(f"{where}: the header is not as long as it says.")
    try:
        metadata, body = _split_metadata(raw[8:].rstrip(b" ")) if known is not None else (None, raw[8:])
        header = known.get(body) if known is not None else None
        if header is None:
            header = _parsed(body, metadata is not None)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: the safetensors header is refused: {cause}.") from cause
    if known is not None:
        known[body] = header
    return header if metadata is None else Header(header.items, metadata, header.data_bytes)


def _parsed(body: bytes, has_metadata: bool) -> Header:
    """The header in its JSON, from which the metadata may have been taken out. Raises ValueError."""
    data = parse_json(body)
    if not isinstance(data, dict):
        raise ValueError("it is no object")
    if has_metadata and "__metadata__" in data:
        raise ValueError("it has metadata twice")
    metadata = _checked_metadata(data.pop("__metadata__", None))
    items = {name: _item(name, entry) for name, entry in data.items()}
    header = Header(items, metadata, max((item.end for item in items.values()), default=0))
    # Tensors must follow each other without gaps or overlaps, so that every byte of the file is checked.
    end = 0
    for name, item in header.in_order():
        if item.begin != end:
            raise ValueError(f"tensor {name!r} begins at {item.begin}, expected {end}")
        end = item.end
    return header


def _split_metadata(text: bytes) -> tuple[dict[str, str] | None, bytes]:
    """The metadata and the rest of a header, or None and all of it if the metadata doesn't come first."""
    first = b'{"__metadata__":'
    if not text.startswith(first):
        return None, text
    after = text[len(first) :].decode("utf-8")
    found, end = DECODER.raw_decode(after)
    rest = after[end:].encode()
    if not rest.startswith(b","):
        return None, text
    return _checked_metadata(found), b"{" + rest[1:]


def _checked_metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("its metadata is not text by name")
    "".join(found.values()).encode()  # fails on half a surrogate pair
    return found


def _item(name: str, entry: Any) -> Item:
    if not name or len(name) > NAME_LENGTH or not name.isprintable():
        raise ValueError(f"{brief(name)} can't name a tensor (printable, at most {NAME_LENGTH} characters)")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} lacks a dtype, a shape or its offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {brief(code)}, expected a floating point one")
    for numbers, most in ((shape, DIMENSIONS), (offsets, 2)):
        whole = isinstance(numbers, list) and len(numbers) <= most
        if not whole or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"tensor {name!r} has shape {brief(shape)} and offsets {brief(offsets)}")
    dtype = DTYPES[code]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"tensor {name!r} has shape {brief(shape)} and offsets {brief(offsets)}, which don't agree"
        )
    return Item(dtype, tuple(shape), offsets[0], offsets[1])


def write_header(items: Mapping[str, Item], metadata: Mapping[str, str], align: int = 8) -> bytes:
    """The first bytes of a file with these tensors, padded so that the tensors begin at a multiple of `align`."""
    data: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, item in items.items():
        data[name] = {
            "dtype": CODES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [item.begin, item.end],
        }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)
    return len(text).to_bytes(8, "little") + text


def read_tensor_file(
    path: Path, error: type[PhatgooseError] = ExpertError, *, empty: bool = False
) -> TensorFile:
    """Reads a whole file; what takes more memory than there is, and values that aren't finite, are refused.

    Args:
        empty: accept tensors without values; the caller must handle them.
    """
    with open_regular(Path(path), error) as (file, size):
        raw, header = _header_of(file, size, str(path), error)
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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all. The same content always gives the same bytes.

    They are those of safetensors' own writer, except that it writes metadata of several keys in random order.
    """
    found, rank = dict(tensors), {dtype: i for i, dtype in enumerate(CODES)}
    order = sorted(found, key=lambda name: (rank.get(found[name].dtype, 0), name))
    write_in_order(path, {name: found[name] for name in order}, dict(sorted((metadata or {}).items())))


def write_in_order(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As `write_tensors`, with tensors and metadata in the order given."""
    items, end = dict[str, Item](), 0
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise ExpertError(
                f"{path}: tensor {name!r} is in {tensor.dtype}, expected a floating point dtype."
            )
        items[name] = Item(tensor.dtype, tuple(tensor.shape), end, end + tensor.nbytes)
        end += tensor.nbytes
    write_bytes(path, write_header(items, metadata), *map(bytes_of, tensors.values()))


def copied(
    source: Path | None, target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> bool:
    """Copies the file that tensors were read from if it still holds just these, and this metadata; whether it did.

    A copy keeps the file's sha256. A file that is written anew may have another, since other writers order otherwise.
    """
    if source is None or not source.is_file():
        return False
    with contextlib.suppress(ExpertError):  # a damaged file is replaced
        found = read_tensor_file(source, empty=True)
        if metadata in (None, found.metadata) and all_identical(found.tensors, tensors):
            shutil.copyfile(source, target)
            return True
    return False


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values, row by row, as in a safetensors file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


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


def check_sha256(
    expected: Any, found: str, path: Path, what: str = "", error: type[PhatgooseError] = ExpertError
) -> None:
    """Refuses a file whose sha256 isn't the expected one, which `what` recorded."""
    if expected != found:
        said = f"{what} is {brief(expected)}, the file's is" if what else f"expected sha256 {expected}, found"
        raise error(f"{path} is damaged or was changed: {said} {found}.")


def check_finite(tensor: Tensor, where: str, error: type[PhatgooseError] = ExpertError) -> None:
    """Refuses NaN and infinity. It works in pieces, so that checking a large tensor takes little memory."""
    flat, bad = tensor.detach().reshape(-1), 0
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        wide = piece if piece.dtype.itemsize > 1 else piece.float()  # float8 knows no isfinite
        finite = torch.isfinite(wide)
        if not bool(finite.all()):
            bad += int(finite.numel() - finite.sum())
    if bad:
        raise error(f"{where} has {bad} of {tensor.numel()} values that are NaN or infinite.")
