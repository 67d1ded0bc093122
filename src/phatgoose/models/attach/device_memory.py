"""A pool larger than its device: how many bytes there are for it, how modules share them, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.models.base.base import Base, unwrap_model
from phatgoose.models.context.prompted import ATTRIBUTE
from phatgoose.ops import Stack
from phatgoose.ops.offload.experts import Cached, Room
from phatgoose.ops.offload.slots import Counts

if TYPE_CHECKING:
    from phatgoose.models.attach.site import Site

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: int | str) -> int:
    """Bytes: a whole number, or "8GB", "512 MiB", "1.5G".

    Raises:
        RoutingError: it is neither, or less than one.
    """
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
    """What a budget of device memory was made into, and how it did since routing was attached."""

    budget_bytes: int
    """What may be used, of all devices together."""
    resident_bytes: int
    """What always stands there: gates of all experts in 8 or 16 bits, vectors, and what can't be cached."""
    cache_bytes: int
    """For experts and float32 gates that were used last. It is allocated when a module runs first."""
    pool_bytes: int
    """What all of them would take."""
    experts: Counts
    """Of experts' low-rank rows."""
    gates: Counts
    """Of float32 gates, which only the experts need that coarse gates leave in doubt."""


def cache_use(model: Base | PreTrainedModel) -> CacheUse | None:
    """How the pool that is attached to this model uses its `device_memory`; None where it has none."""
    bare = unwrap_model(model)
    routing = bare.__dict__.get(ATTRIBUTE)
    return None if routing is None or routing.budget is None else routing.budget.use()


class Budget:
    """The bytes that the sites of one routing share.

    Raises:
        RoutingError: the least that is needed is more.
    """

    def __init__(self, sites: Sequence[Site], budget: int):
        self.budget = budget
        self.cached = [site.fused for site in sites if isinstance(site.fused, Cached)]
        whole = [site for site in sites if not isinstance(site.fused, Cached)]
        self.resident = sum(one.resident_bytes for one in self.cached) + sum(map(_whole_bytes, whole))
        least = sum(one.bytes(one.least) for one in self.cached)
        self.pool = sum(one.bytes(one.most) for one in self.cached)
        if budget < self.resident + least:
            kept = (
                f", {len(whole)} modules with embedding or bottleneck adapters as they are" if whole else ""
            )
            raise RoutingError(
                f"device_memory is {budget:,} bytes, and this pool needs {self.resident + least:,} at least: {self.resident:,} for what "
                f"is always there (gates in 8 or 16 bits{kept}) and {least:,} for one expert at each of {len(self.cached)} modules. "
                "Give it more, or route fewer experts."
            )
        left, wanted = budget - self.resident - least, max(1, self.pool - least)
        for one in self.cached:
            one.room = _between(one.least, one.most, min(1.0, left / wanted))
        self.cache = sum(one.bytes(one.room) for one in self.cached)

    def use(self) -> CacheUse:
        experts, gates = Counts(), Counts()
        for one in self.cached:
            experts, gates = experts + one.counts[0], gates + one.counts[1]
        return CacheUse(self.budget, self.resident, self.cache, self.pool, experts, gates)


def cacheable(stack: Stack) -> bool:
    """Whether a module's experts can be brought to the device when they are needed; others stay there."""
    return not stack.embedding and not stack.bottlenecks


def _between(least: Room, most: Room, share: float) -> Room:
    return Room(
        least.gates + int(share * (most.gates - least.gates)), least.rows + int(share * (most.rows - least.rows))
    )  # fmt: skip


def _whole_bytes(site: Site) -> int:
    """What a site that isn't cached takes: its stack, and its gates in float32."""
    stack = site.stack
    tensors = [stack.A, stack.B, *stack.other_tensors()]
    if site.router.by_gates is not None:
        tensors.append(site.router.by_gates[0])
    return sum(t.nbytes for t in tensors)
