"""Pools under names: complete, frozen lists of tasks to train experts on, one expert each."""

from __future__ import annotations

from phatgoose.registry import lookup
from phatgoose.tasks.lists.entries import Entry

POOLS = {
    "t0-held-in": "phatgoose.tasks.lists.pools_t0:entries",
    "flan": "phatgoose.tasks.lists.pools_flan:entries",
    "bigbench": "phatgoose.tasks.lists.pools_bigbench:entries",
}


def pool_entries(name: str) -> tuple[Entry, ...]:
    """The entries of a named pool.

    Raises:
        UnknownName: there is no pool of this name.
    """
    return lookup("pool", name, POOLS)()
