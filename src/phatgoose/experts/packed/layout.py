"""What the experts of one config and one header have in common: found out once, whatever number of them a packed pool has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from phatgoose.experts.adapters.peft import to_contents
from phatgoose.experts.adapters.peft_keys import SHARED, plain_keys
from phatgoose.experts.adapters.peft_target_parameters import owner_of
from phatgoose.experts.files.safetensors_header import Header, Item
from phatgoose.experts.names import PEFT_WEIGHTS
from phatgoose.ops.update import Update


@dataclass(frozen=True)
class Pair:
    """The low-rank matrices of an expert at one module, whose rows stand in two stacks of the packed file.

    `down` and `up` name the stacks of A [·, d_in] and of B transposed [·, d_out].
    """

    index: int
    """Which of the expert's pairs it is: they are numbered by module path, sorted."""
    key_a: str
    key_b: str
    rank: int
    dtype: torch.dtype
    down: str
    up: str
    widths: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """An adapter without its values."""

    header: Header
    updates: Mapping[str, Update]
    """By module path, of tensors without values (on the meta device)."""
    copies: Mapping[str, str]
    """Weights of the base that were saved along, by parameter name: their keys."""
    pairs: Mapping[str, Pair]
    """By module path, sorted."""
    spots: Mapping[str, tuple[Pair, bool]]
    """Key → the pair it belongs to, and whether it is B."""
    apart: Mapping[str, Item]
    """What stands in no stack, under its name in the rest."""
    keys: Mapping[str, tuple[str, ...]]
    """All keys of one module, by its path."""
    sizes: Mapping[str, tuple[int, int, bool]]
    """Module path → d_in, d_out (0: only the base knows), whether it is an embedding."""


def layout_of(
    config: Mapping[str, Any],
    header: Header,
    apart: Collection[str] | None,
    where: str,
    drop: Collection[str] = (),
) -> Layout:
    """The layout of an adapter with this PEFT config and these tensors.

    `apart`: the keys that stand in no stack; None when nobody decided yet: then those that aren't low-rank pairs of one dtype.

    Raises:
        ExpertError: as `to_contents` does.
    """
    tensors = {
        key: torch.empty(item.shape, dtype=item.dtype, device="meta") for key, item in header.items.items()
    }
    named = {id(tensor): key for key, tensor in tensors.items()}
    contents = to_contents(config, tensors, where, drop)
    pairs: dict[str, Pair] = {}
    for path in sorted(contents.updates):
        update = contents.updates[path]
        key_a, key_b = named.get(id(update.A)), named.get(id(update.B))
        if key_a is None or key_b is None or update.rank == 0 or update.A.dtype != update.B.dtype:
            continue
        if apart is not None and key_a in apart and key_b in apart:
            continue
        dtype, widths = update.A.dtype, (update.d_in, update.d_out)
        name = str(dtype).removeprefix("torch.")
        down, up = f"{path}.lora_A.{name}", f"{path}.lora_B.{name}"
        pairs[path] = Pair(len(pairs), key_a, key_b, update.rank, dtype, down, up, widths)
    spots = {p.key_a: (p, False) for p in pairs.values()} | {p.key_b: (p, True) for p in pairs.values()}
    copies = {name: named[id(tensor)] for name, tensor in contents.base_copies.items()}
    sizes = {path: (u.d_in, u.d_out, u.embedding) for path, u in contents.updates.items()}
    beside = {f"{PEFT_WEIGHTS}/{key}": item for key, item in header.items.items() if key not in spots}
    return Layout(
        header, contents.updates, copies, pairs, spots, beside, _by_module(header, sizes, where), sizes
    )


def _by_module(header: Header, paths: Collection[str], where: str) -> dict[str, tuple[str, ...]]:
    """The keys of each module: those that begin with its path, and with no longer one; and those that several modules share."""
    found: dict[str, list[str]] = {path: [] for path in paths}
    parts: dict[str, list[list[str]]] = {}  # of a parameter that holds the layers of several experts
    for path in paths:
        if (owner := owner_of(path)) is not None:
            parts.setdefault(owner, []).append(found[path])
    for key, path in plain_keys(header.items, where).items():
        if path in SHARED:
            for keys in found.values():
                keys.append(key)
            continue
        while path and path not in found and path not in parts:
            path = path.rpartition(".")[0]
        for keys in [found[path]] if path in found else parts.get(path, ()):
            keys.append(key)
    return {path: tuple(keys) for path, keys in found.items()}
