"""An expert as it stands on one model: its modules under that model's names for them. In memory only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TypeVar

from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.ops.update import Update

T = TypeVar("T")


class Renamed(Mapping[str, T]):
    """A mapping under other keys; values are looked up when they are asked for, as those of a packed pool must be.

    Args:
        names: key of `values` → the key here; the others stay as they are.
    """

    def __init__(self, values: Mapping[str, T], names: Mapping[str, str]):
        self._values, self._own = values, {names.get(key, key): key for key in values}

    def __getitem__(self, key: str) -> T:
        return self._values[self._own[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def placed_expert(expert: Expert, names: Mapping[str, str], updates: Mapping[str, Update]) -> Expert:
    """The same expert with these updates, and its gates, data signature and copies under other module paths.

    Args:
        names: the expert's own path of a module → the model's; paths that are the same may be left out.
        updates: by the model's paths.
    """
    found = object.__new__(
        Expert
    )  # not a PackedExpert, whatever it was: its rows can't be used where they stand
    for item in fields(Expert):
        object.__setattr__(found, item.name, getattr(expert, item.name))
    object.__setattr__(found, "updates", updates)
    if not names:
        return found
    if expert.gates is not None:
        object.__setattr__(found, "gates", Renamed(expert.gates, names))
    signature = expert.signature
    if signature is not None and signature.activations is not None:
        renamed = DataSignature(
            dict(Renamed(signature.activations, names)),
            signature.texts,
            signature.encoder,
            signature.encoder_sha256,
        )
        object.__setattr__(found, "signature", renamed)
    return found
