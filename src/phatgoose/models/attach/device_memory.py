"""A pool larger than its device: how modules share a budget of device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phatgoose.errors import RoutingError
from phatgoose.ops.offload.experts import Capacity, OffloadedExperts
from phatgoose.ops.offload.slots import Counts


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
