"""Experts' rows on the host and copies on a device, where the expert used longest ago leaves first."""

from __future__ import annotations

import ctypes
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass
class Counts:
    """What happened since routing was attached. An expert is counted once per module and forward pass."""

    hits: int = 0
    """Experts that were on the device when they were needed."""
    misses: int = 0
    """Experts that had to be copied there."""
    evictions: int = 0
    """Experts whose rows were overwritten."""
    bytes_copied: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class Slots:
    """Room for `capacity` rows of these matrices [R, d] on a device. Expert e owns sizes[e] rows of each, from
    starts[e] on.

    Copies are made on the device's current stream; for a GPU, from pinned memory. The host doesn't wait for
    them, and what is computed next does.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        starts: Sequence[int],
        sizes: Sequence[int],
        capacity: int,
        device: torch.device,
        prefetch: bool = False,
    ):
        """`prefetch`: whether the matrices are mapped from a file that may not fit into memory."""
        assert capacity >= max(sizes, default=0)
        self.matrices, self.starts, self.sizes = tuple(matrices), starts, sizes
        # Tensors made in inference mode couldn't be written into outside of it.
        with torch.inference_mode(False):
            empty = [torch.empty(capacity, m.shape[1], dtype=m.dtype, device=device) for m in matrices]
        self.on_device = tuple(empty)
        """[capacity, d] of each matrix; rows that no expert owns hold anything."""
        self.counts, self.prefetch = Counts(), prefetch
        self._row_bytes = sum(m.shape[1] * m.element_size() for m in matrices)
        # Expert → its first row on the device. The expert used last is at the end.
        self._at: OrderedDict[int, int] = OrderedDict()
        self._free = _FreeRuns(capacity)

    def visit(self, experts: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Brings all of these experts (different, in order) to the device, in as few parts as there is room for.

        Yields the experts of a part, in order, and their first rows in `on_device`. They stay until the next
        part is asked for.
        """
        waiting = list(experts)
        for expert in waiting if self.prefetch else ():
            if expert not in self._at:
                for matrix in self.matrices:
                    will_need(matrix[self.starts[expert] : self.starts[expert] + self.sizes[expert]])
        while waiting:
            # Those that are on the device come first, so that the others can't overwrite them.
            present = [e for e in waiting if e in self._at]
            for expert in present:
                self._at.move_to_end(expert)
            self.counts.hits += len(present)
            part, missing = set(present), [e for e in waiting if e not in self._at]
            for expert in missing:
                if not self._copy(expert, part):
                    break
                part.add(expert)
            waiting = [e for e in missing if e not in part]
            yield (found := sorted(part)), [self._at[e] for e in found]

    def _copy(self, expert: int, stay: set[int]) -> bool:
        """Copies an expert's rows to the device. False if there is no room, and only experts in `stay` could leave."""
        size = self.sizes[expert]
        while (row := self._free.take(size)) is None:
            oldest = next(iter(self._at), None)
            if oldest is None or oldest in stay:  # those used after it are in `stay`, too
                return False
            self._free.give(self._at.pop(oldest), self.sizes[oldest])
            self.counts.evictions += 1
        start = self.starts[expert]
        try:
            for matrix, copies in zip(self.matrices, self.on_device, strict=True):
                rows = matrix[start : start + size]
                copies[row : row + size].copy_(
                    rows.pin_memory() if copies.is_cuda else rows, non_blocking=True
                )
        except BaseException:
            self._free.give(row, size)
            raise
        self._at[expert] = row
        self.counts.misses += 1
        self.counts.bytes_copied += size * self._row_bytes
        return True


def will_need(rows: Tensor) -> None:
    """Asks the system to read mapped rows, without waiting. A copy alone would wait for one page after the other."""
    if rows.numel() and (madvise := _madvise()) is not None:
        start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, rows.data_ptr() + rows.nbytes - start, mmap.MADV_WILLNEED)


@cache
def _madvise() -> Any:
    """The C library's madvise, since Python's own takes a mapping and no address; None if there is none."""
    found = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_WILLNEED") else None
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


class _FreeRuns:
    """Runs of free rows. Runs that touch are merged into one."""

    def __init__(self, rows: int):
        self._end, self._start = {0: rows}, {rows: 0}

    def take(self, size: int) -> int | None:
        """The first of `size` rows, from the shortest run that has them."""
        fitting = ((end - start, start) for start, end in self._end.items() if end - start >= size)
        if (best := min(fitting, default=None)) is None:
            return None
        length, start = best
        self._remove(start)
        if length > size:
            self._add(start + size, start + length)
        return start

    def give(self, start: int, size: int) -> None:
        """Takes these rows back, and merges them with the runs before and behind them."""
        end = start + size
        if start in self._start:
            start = self._start[start]
            self._remove(start)
        if end in self._end:
            following, end = end, self._end[end]
            self._remove(following)
        self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        self._end[start], self._start[end] = end, start

    def _remove(self, start: int) -> None:
        del self._start[self._end.pop(start)]
