"""The header of a safetensors file: read and checked without its tensors, and written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import ExpertError, PhatgooseError, brief
from phatgoose.files import open_regular
from phatgoose.strict_json import parse_json

LIMIT_BYTES = 32 * 2**20
NAME_LENGTH = 1000
DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


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


def read_header(path: Path, error: type[PhatgooseError] = ExpertError) -> tuple[bytes, Header]:
    """A file's first bytes, up to its tensors, and the header in them; the file must be as long as the header says.

    Raises:
        PhatgooseError: of the type `error`: the file is no whole safetensors file of floating-point tensors.
    """
    with open_regular(Path(path), error) as (file, size):
        return header_of(file, size, str(path), error)


def header_of(
    file: BufferedReader, size: int, where: str, error: type[PhatgooseError] = ExpertError
) -> tuple[bytes, Header]:
    """As `read_header`, of an open file of `size` bytes at its beginning; it is left at the first tensor."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    # Bounded before it is read: a stranger's file may claim any length.
    if len(first) < 8 or length > min(size - 8, LIMIT_BYTES):
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
        if known is not None and body in known:
            same = known[body]
            return same if metadata is None else Header(same.items, metadata, same.data_bytes)
        data = parse_json(body)
        if not isinstance(data, dict):
            raise ValueError("it is no object")
        if metadata is not None and "__metadata__" in data:
            raise ValueError("it has metadata twice")
        inside = _checked_metadata(data.pop("__metadata__", None))
        items = {name: _item(name, entry) for name, entry in data.items()}
        # Tensors must follow each other without gaps or overlaps, so that every byte of the file is checked.
        end = 0
        header = Header(items, inside, max((item.end for item in items.values()), default=0))
        for name, item in header.in_order():
            if item.begin != end:
                raise ValueError(f"tensor {name!r} begins at {item.begin}, expected {end}")
            end = item.end
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: the safetensors header is refused: {cause}.") from cause
    if known is not None:
        known[body] = header
    return header if metadata is None else Header(items, metadata, header.data_bytes)


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


def _checked_metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("its metadata is not text by name")
    return found


def _split_metadata(text: bytes) -> tuple[dict[str, str] | None, bytes]:
    """The metadata and the rest of a header, or None and all of it if the metadata doesn't come first."""
    first = b'{"__metadata__":'
    if not text.startswith(first):
        return None, text
    found, end = json.JSONDecoder().raw_decode(text[len(first) :].decode("utf-8"))
    rest = text[len(first) :].decode("utf-8")[end:].encode()
    if not rest.startswith(b","):
        return None, text
    return _checked_metadata(found), b"{" + rest[1:]
