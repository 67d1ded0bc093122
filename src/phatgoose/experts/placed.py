"""An expert under one model's own names of its modules. In memory only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TypeVar

from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.ops.update import Update

T = TypeVar("T")


class Renamed(Mapping[str, T]):
    """A mapping under other keys. Values are looked up on use, since a packed pool makes them only then.

    Args:
        keys: each key here → its key in `values`.
    """

    def __init__(self, values: Mapping[str, T], keys: Mapping[str, str]):
        self._values, self._keys = values, keys

    def __getitem__(self, key: str) -> T:
        return self._values[self._keys[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def placed_expert(
    expert: Expert, updates: Mapping[str, Update], paths: Mapping[str, str] | None = None
) -> Expert:
    """The same expert with these updates, and with its gates and data signature under other module paths.

    Args:
        updates: by the model's path of a module.
        paths: the model's path of each module → the expert's own; None if all are the same.
    """
    # Not by __init__, since the adapter's tensors keep their own names; and never a PackedExpert, since its rows
    # can't be used as they are in the file.
    found = object.__new__(Expert)
    vars(found).update({item.name: getattr(expert, item.name) for item in fields(Expert)}, updates=updates)
    if paths is None:
        return found
    if expert.gates is not None:
        vars(found)["gates"] = Renamed(expert.gates, paths)
    signature = expert.signature
    if signature is not None and (signature.has_activations or signature.has_prompts):
        means = None if signature.activations is None else dict(Renamed(signature.activations, paths))
        prompts = signature.prompts
        if prompts is not None:
            prompts = {path: prompts[own] for path, own in paths.items() if own in prompts}
        vars(found)["signature"] = DataSignature(
            means, signature.texts, signature.encoder, signature.encoder_sha256, prompts=prompts
        )
    return found
