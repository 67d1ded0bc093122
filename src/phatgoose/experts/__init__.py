"""Experts and pools, on disk and in memory.

In: adapters that strangers wrote, and folders of ours. Out: an `Expert` (its updates by module, gates, data
signature and records) and a `Pool`. Read in this order: `names`, `folder`, `expert`, `manifest`, `pool`,
`pool_folder`.
A new kind of adapter: `adapters/`. A new file beside an expert: `names.py`, `folder.py` and `Expert.save`.
"""

from phatgoose.experts.expert import Expert
from phatgoose.ops.update import Update

__all__ = ["Expert", "Update"]
