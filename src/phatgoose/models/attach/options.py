"""How a pool is attached to a model: `RouteOptions`, and how modules share a budget of device memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from phatgoose.errors import RoutingError
from phatgoose.ops.offload.experts import Capacity, OffloadedExperts
from phatgoose.ops.offload.slots import Counts

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class RouteOptions:
    """The keywords of `route`, as one object that callers hand on.

    Raises:
        RoutingError: `device_memory` is no number of bytes.
    """

    backend: str = "auto"
    """"auto", "cpu", "triton", "torch" or "reference"."""
    dtype: torch.dtype | None = None
    """The dtype of the experts' matrices; None: the one each module computes in."""
    any_base: bool = False
    """Skip the check that the model is the pool's base."""
    device_memory: int | str | None = None
    """Bytes, or "8GB", that the pool may take on the model's devices; None: as much as it needs."""

    def __post_init__(self) -> None:
        if self.device_memory is not None:
            object.__setattr__(self, "device_memory", parse_bytes(self.device_memory))


def parse_bytes(text: int | str) -> int:
    """Bytes: a whole number, or "8GB", "512 MiB", "1.5G". Raises RoutingError if it is neither, or less than one."""
    found = None
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?I?)B?\s*", text.upper())
        if match is not None and match[2] in _UNITS:
            found = int(float(match[1]) * _UNITS[match[2]])
    elif not isinstance(text, bool):
        found = int(text)
    if found is None or found < 1:
        raise RoutingError(
            f"device_memory is {text!r}, expected bytes, such as 8000000000, '8GB' or '512MiB'."
        )
    return found


@dataclass(frozen=True)
class CacheUse:
    """How a budget of device memory was divided, and how often it sufficed since routing was attached."""

    budget_bytes: int
    """The budget, of all devices together."""
    resident_bytes: int
    """Bytes that are always on the device: quantised gates of all experts, vectors, modules that can't be offloaded."""
    cache_bytes: int
    """Bytes for the experts and float32 gates that were used last, allocated when a module first runs."""
    pool_bytes: int
    """Bytes that all of these would take."""
    experts: Counts
    """Hits and misses of experts' low-rank rows."""
    gates: Counts
    """Hits and misses of float32 gates, which are needed where quantised gates leave the choice open."""


class Budget:
    """The bytes of device memory that the modules of one routing share.

    Args:
        offloaded: modules whose experts are brought to the device when they are needed.
        whole: bytes of each other module, whose experts all stay there.

    Raises:
        RoutingError: the least that is needed is more than `budget`.
    """

    def __init__(self, offloaded: Sequence[OffloadedExperts], whole: Sequence[int], budget: int):
        self.budget, self.offloaded = budget, offloaded
        self.resident = sum(one.resident_bytes for one in offloaded) + sum(whole)
        least = sum(one.bytes(one.min_capacity) for one in offloaded)
        self.pool = sum(one.bytes(one.max_capacity) for one in offloaded)
        if budget < self.resident + least:
            kept = (
                f", {len(whole)} modules with embedding or bottleneck adapters as they are" if whole else ""
            )
            raise RoutingError(
                f"device_memory is {budget:,} bytes, and this pool needs {self.resident + least:,} at least: "
                f"{self.resident:,} for what is always there (gates in 8 or 16 bits{kept}) and {least:,} for one "
                f"expert at each of {len(offloaded)} modules. Give it more, or route fewer experts."
            )
        # Every module gets the same share of what it could use beyond its least.
        share = min(1.0, (budget - self.resident - least) / max(1, self.pool - least))
        for one in offloaded:
            least_of, most = one.min_capacity, one.max_capacity
            one.capacity = Capacity(
                least_of.gates + int(share * (most.gates - least_of.gates)),
                least_of.rows + int(share * (most.rows - least_of.rows)),
            )
        self.cache = sum(one.bytes(one.capacity) for one in offloaded)

    def use(self) -> CacheUse:
        """The budget's sizes, and the hits and misses so far."""
        experts, gates = Counts(), Counts()
        for one in self.offloaded:
            experts, gates = experts + one.counts[0], gates + one.counts[1]
        return CacheUse(self.budget, self.resident, self.cache, self.pool, experts, gates)
