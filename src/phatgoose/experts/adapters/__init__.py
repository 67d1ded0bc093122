"""Adapter files → updates. Two formats are read: PEFT's and AdapterHub's.

In: an adapter's config and its tensors, from a stranger.
Out: what the adapter does at each module (`ops.update.Update`), or an `ExpertError` that names what can't be
computed exactly.

To add a kind of PEFT adapter: what its tensors compute goes into `KINDS` of `peft_updates.py`, the settings it may
have into `rules.toml`, under the same name.
"""
