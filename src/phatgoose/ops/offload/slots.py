"""Rows of experts that stand on the host, kept on a device as far as there is room: those used last stay."""

from __future__ import annotations

import ctypes
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass
class Counts:
    """What happened since routing was attached; an expert is counted once a module and forward."""

    hits: int = 0
    """Experts that were on the device when they were needed."""
    misses: int = 0
    """Experts that had to be copied there."""
    evictions: int = 0
    """Experts whose place was taken."""
    bytes_copied: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.hits + other.hits, self.misses + other.misses, self.evictions + other.evictions,
            self.bytes_copied + other.bytes_copied,
        )  # fmt: skip


class Slots:
    """Room for `capacity` rows of these matrices [R, d] on a device. Expert e owns counts[e] rows of each, from starts[e] on.

    Copies are made on the device's current stream, from pinned memory where that is a GPU's: the host doesn't wait for them, and what
    is computed next does.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        starts: Sequence[int],
        counts: Sequence[int],
        capacity: int,
        device: torch.device,
        ahead: bool = False,
    ):
        """`ahead`: the matrices stand in a file that memory may not hold."""
        assert capacity >= max(counts, default=0)
        self.matrices, self.starts, self.sizes = tuple(matrices), starts, counts
        with torch.inference_mode(False):  # or nobody could write into them outside of it
            empty = [torch.empty(capacity, m.shape[1], dtype=m.dtype, device=device) for m in matrices]
        self.there = tuple(empty)
        """[capacity, d] of each matrix, on the device; rows that no expert owns hold anything."""
        self.counts, self.ahead = Counts(), ahead
        self._row_bytes = sum(m.shape[1] * m.element_size() for m in matrices)
        self._at: OrderedDict[int, int] = (
            OrderedDict()
        )  # expert → its first row there, the one used last at the end
        self._free = _Runs(capacity)

    def visit(self, experts: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """All of these (different, in order), in as few parts as there is room for: the experts of a part, in order, and their first
        rows in `there`. They stay there until the next part is asked for."""
        waiting = list(experts)
        for expert in waiting if self.ahead else ():
            if expert not in self._at:
                for matrix in self.matrices:
                    will_need(matrix[self.starts[expert] : self.starts[expert] + self.sizes[expert]])
        while waiting:
            here = [e for e in waiting if e in self._at]  # first, so that the others can't take their places
            for expert in here:
                self._at.move_to_end(expert)
            self.counts.hits += len(here)
            part, missing = set(here), [e for e in waiting if e not in self._at]
            for expert in missing:
                if not self._bring(expert, part):
                    break
                part.add(expert)
            waiting = [e for e in missing if e not in part]
            yield (found := sorted(part)), [self._at[e] for e in found]

    def _bring(self, expert: int, stay: set[int]) -> bool:
        """Copies an expert's rows to the device; False where only those that must stay are left to make room."""
        size = self.sizes[expert]
        while (row := self._free.take(size)) is None:
            oldest = next(iter(self._at), None)
            if oldest is None or oldest in stay:  # all behind it are, too
                return False
            self._free.give(self._at.pop(oldest), self.sizes[oldest])
            self.counts.evictions += 1
        start = self.starts[expert]
        try:
            for matrix, there in zip(self.matrices, self.there, strict=True):
                rows = matrix[start : start + size]
                there[row : row + size].copy_(rows.pin_memory() if there.is_cuda else rows, non_blocking=True)
        except BaseException:
            self._free.give(row, size)
            raise
        self._at[expert] = row
        self.counts.misses += 1
        self.counts.bytes_copied += size * self._row_bytes
        return True


def will_need(rows: Tensor) -> None:
    """Has mapped rows read, without waiting for them; copied page by page, they would be waited for one after the other."""
    if rows.numel() and (madvise := _madvise()) is not None:
        start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, rows.data_ptr() + rows.nbytes - start, mmap.MADV_WILLNEED)


@cache
def _madvise() -> Any:
    """The C library's, as Python's own wants the mapping and not an address; None where there is none."""
    found = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_WILLNEED") else None
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


class _Runs:
    """Runs of free rows; those that touch are one."""

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
