"""A packed pool's file: stacks of rows, mapped into memory, and written in place."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phatgoose.errors import PoolError
from phatgoose.experts.files.safetensors_file import Item, bytes_of, read_header, write_header
from phatgoose.files import storage_errors

FORMAT, VERSION = "phatgoose-stacks", "1"
# Python names this flag only from 3.13 on. Without it Linux refuses to map a file larger than the machine's memory.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class StackFile:
    """Stacks [capacity, width] by name, mapped into memory: only pages that are used become resident.

    Don't write into the tensors."""

    def __init__(self, path: Path):
        self.path = path
        raw, self.header = read_header(path, PoolError)
        self.start = len(raw)
        self.bytes = self.start + self.header.data_bytes
        found = (self.header.metadata.get("format"), self.header.metadata.get("version"))
        if found != (FORMAT, VERSION):
            raise PoolError(
                f"{path} has format {found[0]!r} version {found[1]!r}; expected {FORMAT!r} version {VERSION!r}. "
                "A later version needs a later phatgoose."
            )
        with open(path, "rb") as file:
            # Private: whoever writes into a tensor by mistake changes its own copy of the page, not the pool.
            self._map = mmap.mmap(
                file.fileno(), self.bytes, mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            )
        self.stacks = {name: self._stack(name, item) for name, item in self.header.items.items()}

    def _stack(self, name: str, item: Item) -> Tensor:
        if len(item.shape) != 2 or 0 in item.shape or (self.start + item.begin) % item.dtype.itemsize:
            raise PoolError(
                f"{self.path}: stack {name!r} has shape {list(item.shape)} and begins at byte "
                f"{self.start + item.begin}; expected [rows, width] at a whole number of its values."
            )
        count = item.shape[0] * item.shape[1]
        flat = torch.frombuffer(self._map, dtype=item.dtype, count=count, offset=self.start + item.begin)
        return flat.view(item.shape)

    def capacity(self, name: str) -> int:
        """How many rows a stack has room for; 0 if there is none of this name."""
        return self.stacks[name].shape[0] if name in self.stacks else 0

    def release(self, names: Collection[str]) -> None:
        """Frees the memory of these stacks' pages; they are read from the file again when they are used again."""
        page = mmap.PAGESIZE
        for name in names:
            item = self.header.items[name]
            begin = (self.start + item.begin) // page * page
            end = -(-(self.start + item.end) // page) * page
            self._map.madvise(mmap.MADV_DONTNEED, begin, min(end, self.bytes) - begin)

    def __deepcopy__(self, memo: object) -> StackFile:
        return self

    def __reduce__(self) -> tuple[type[StackFile], tuple[Path]]:
        return StackFile, (self.path.absolute(),)  # a pickle names the file, and unpickling maps it again


@dataclass(frozen=True)
class StackShape:
    """The dtype and size of a stack."""

    dtype: torch.dtype
    rows: int
    width: int


def create_stacks(path: Path, shapes: Mapping[str, StackShape]) -> None:
    """Makes a file of empty stacks in this order. It is sparse: rows that were never written take no space on disk."""
    items, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.rows * shape.width * shape.dtype.itemsize
        items[name] = Item(shape.dtype, (shape.rows, shape.width), begin, end)
    raw = write_header(items, {"format": FORMAT, "version": VERSION}, align=mmap.PAGESIZE)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(raw)
            file.truncate(len(raw) + end)
            os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[Callable[[str, int, Tensor], None]]:
    """A function that writes rows [n, width] into a stack from a row on; when the block ends, everything is on disk."""
    raw, header = read_header(path, PoolError)

    def put(name: str, start: int, rows: Tensor) -> None:
        item = header.items[name]
        if rows.dtype != item.dtype or rows.shape[1:] != item.shape[1:] or start + len(rows) > item.shape[0]:
            raise PoolError(
                f"{path}: rows {list(rows.shape)} of {rows.dtype} don't fit into {name!r} from {start} on."
            )
        at = len(raw) + item.begin + start * item.shape[1] * item.dtype.itemsize
        data = bytes_of(rows)
        while data:
            written = os.pwrite(handle, data, at)
            at, data = at + written, data[written:]

    with storage_errors(path):
        handle = os.open(path, os.O_RDWR)
        try:
            yield put
            os.fsync(handle)
        finally:
            os.close(handle)
