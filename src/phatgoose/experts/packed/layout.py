"""An adapter without its values: what packed experts of one config and header share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from phatgoose.experts.adapters.peft import SHARED, plain_keys, to_contents
from phatgoose.experts.adapters.peft_lora import owner_of
from phatgoose.experts.files.safetensors_file import Header, Item
from phatgoose.experts.names import PEFT_WEIGHTS
from phatgoose.ops.update import Update


@dataclass(frozen=True)
class Pair:
    """The low-rank matrices A and B of an expert at one module, which are rows of two stacks."""

    index: int
    """Its number among the expert's pairs, by sorted module path."""
    key_a: str
    key_b: str
    rank: int
    dtype: torch.dtype
    down: str
    """The stack of A [·, d_in]."""
    up: str
    """The stack of B transposed [·, d_out]."""
    widths: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tensors of an adapter are, and what they are."""

    header: Header
    updates: Mapping[str, Update]
    """By module path; their tensors are on the meta device, so without values."""
    copies: Mapping[str, str]
    """Weights of the base that were saved along: parameter name → key."""
    pairs: Mapping[str, Pair]
    """By module path, sorted."""
    stacked: Mapping[str, tuple[Pair, bool]]
    """Key → the pair it belongs to, and whether it is B."""
    rest: Mapping[str, Item]
    """Tensors that are in no stack, by their names in the rest."""
    keys: Mapping[str, tuple[str, ...]]
    """Module path → all keys of its tensors."""
    sizes: Mapping[str, tuple[int, int, bool]]
    """Module path → d_in, d_out (0: only the base knows), whether it is an embedding."""


def layout_of(
    config: Mapping[str, Any],
    header: Header,
    unstacked: Collection[str] | None,
    where: str,
    drop: Collection[str] = (),
) -> Layout:
    """The layout of an adapter with this PEFT config and these tensors.

    Args:
        unstacked: the keys that are in no stack; None to choose them: all but low-rank pairs of one dtype.
    """
    # The same code that reads real tensors is run on tensors without values; their identity then tells which key
    # became which matrix.
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
        if unstacked is not None and key_a in unstacked and key_b in unstacked:
            continue
        dtype, widths = update.A.dtype, (update.d_in, update.d_out)
        name = str(dtype).removeprefix("torch.")
        down, up = f"{path}.lora_A.{name}", f"{path}.lora_B.{name}"
        pairs[path] = Pair(len(pairs), key_a, key_b, update.rank, dtype, down, up, widths)
    stacked = {p.key_a: (p, False) for p in pairs.values()} | {p.key_b: (p, True) for p in pairs.values()}
    copies = {name: named[id(tensor)] for name, tensor in contents.base_copies.items()}
    sizes = {path: (u.d_in, u.d_out, u.embedding) for path, u in contents.updates.items()}
    rest = {f"{PEFT_WEIGHTS}/{key}": item for key, item in header.items.items() if key not in stacked}
    keys = _keys_by_module(header, sizes, where)
    return Layout(header, contents.updates, copies, pairs, stacked, rest, keys, sizes)


def _keys_by_module(header: Header, paths: Collection[str], where: str) -> dict[str, tuple[str, ...]]:
    """The keys of each module: of tensors below its path and no longer one, and of shared tensors."""
    found: dict[str, list[str]] = {path: [] for path in paths}
    # 3-D parameters of a mixture, each with the layers of several experts.
    parts: dict[str, list[list[str]]] = {}
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
