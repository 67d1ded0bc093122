"""Adapter files → updates. Two formats are read: PEFT's and AdapterHub's.

In: an adapter's config and its tensors, from a stranger.
Out: what the adapter does at each module (`ops.update.Update`), or an `ExpertError` that names what cannot be reproduced exactly.

A new kind of PEFT adapter: its tensors in `peft_updates.py`, the settings it may have in `peft_rules.py`.
"""
