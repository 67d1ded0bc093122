"""One expert as it goes into a pack: which of its tensors go into which stack, and what stays beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from phatgoose.errors import ExpertError
from phatgoose.experts.adapters.peft import read_tensors
from phatgoose.experts.adapters.peft_rules import check_drop
from phatgoose.experts.files.safetensors_header import Header, read_header
from phatgoose.experts.folder import read_record
from phatgoose.experts.names import CONFIG_FILE, GATES_FILE, HEADERS, PEFT_WEIGHTS, REST_FILE
from phatgoose.experts.packed.expert import gate_stack
from phatgoose.experts.packed.layout import Layout, layout_of
from phatgoose.experts.packed.open import PackedFolder, runs
from phatgoose.experts.packed.stack_file import Shape, Writer
from phatgoose.files import read_json, sha256_file, write_bytes

_ROUND = 64


@dataclass(frozen=True, eq=False)
class Parts:
    """One expert as it goes into a pack."""

    layout: Layout
    gates: Header | None
    gate_paths: Sequence[str]
    """Modules whose gates go into a stack, sorted."""
    tensor: Callable[[str], Tensor]
    gate: Callable[[str], Tensor]
    headers: Mapping[str, bytes]
    packed_files: Mapping[str, str] | None
    """sha256 of the headers and the rest, where they stand already."""


def parts_of(place: Path, entry: Mapping[str, Any], opened: PackedFolder | None) -> Parts:
    if opened is not None and "packed" in entry:
        source = opened.expert(place, entry).source
        paths = sorted(source.gate_index)
        return Parts(
            source.layout, source.gates, paths, source.tensor, source.raw_gate, {}, entry["packed"]["files"]
        )
    drop = check_drop(read_record(place).get("provenance", {}).get("dropped", ()))
    raw, header = read_header(place / PEFT_WEIGHTS)
    layout = layout_of(read_json(place / CONFIG_FILE, ExpertError), header, None, str(place), drop)
    headers, gates, paths = {PEFT_WEIGHTS: raw}, None, list[str]()
    if GATES_FILE in entry["files"]:
        headers[GATES_FILE], gates = read_header(place / GATES_FILE)
        paths = sorted(
            p for p, item in gates.items.items() if item.dtype == torch.float32 and item.end > item.begin
        )
    weights, vectors = (
        cache(partial(read_tensors, place / name)) for name in HEADERS
    )  # read when used, once
    return Parts(layout, gates, paths, lambda k: weights()[k], lambda p: vectors()[p], headers, None)


def shapes_of(experts: Iterable[Parts], spare: float, *, rounded: bool = True) -> dict[str, Shape]:
    """The stacks these experts need: a module's A and B one after the other, all gates at the end."""
    low: dict[str, Shape] = {}
    gates: dict[str, Shape] = {}
    for parts in experts:
        for pair in parts.layout.pairs.values():
            for name, width in zip((pair.down, pair.up), pair.widths, strict=True):
                rows = pair.rank + (low[name].rows if name in low else 0)
                low[name] = Shape(pair.dtype, rows, width)
        for path in parts.gate_paths:
            name, width = gate_stack(path), parts.gates.items[path].shape[0]  # type: ignore[union-attr]
            gates[name] = Shape(torch.float32, 1 + (gates[name].rows if name in gates else 0), width)

    def room(rows: int) -> int:
        return -(-int(rows * (1 + spare)) // _ROUND) * _ROUND if rounded else rows

    return {name: Shape(s.dtype, room(s.rows), s.width) for name, s in (low | gates).items()}


def write_rows(parts: Parts, writer: Writer, used: dict[str, int]) -> dict[str, Any]:
    """Writes an expert's rows past those in use, and says where they are; `used` is counted on."""
    starts, rows = [], []
    for pair in parts.layout.pairs.values():
        start = used.get(pair.down, 0)
        writer.put(pair.down, start, parts.tensor(pair.key_a))
        writer.put(pair.up, start, parts.tensor(pair.key_b).T)
        used[pair.down] = start + pair.rank
        starts.append(start)
    for path in parts.gate_paths:
        row = used.get(gate_stack(path), 0)
        writer.put(gate_stack(path), row, parts.gate(path)[None])
        used[gate_stack(path)] = row + 1
        rows.append(row)
    return {"rows": runs(starts), "gates": runs(rows)}


def keep_beside(place: Path, parts: Parts) -> dict[str, str]:
    """Writes what the stacks don't hold of an expert beside its config; returns the files' sha256."""
    if parts.packed_files is not None:
        return dict(parts.packed_files)
    for name, raw in parts.headers.items():
        write_bytes(place / HEADERS[name], raw)
    rest = {name: parts.tensor(name.removeprefix(f"{PEFT_WEIGHTS}/")) for name in parts.layout.apart}
    if parts.gates is not None:
        stacked = set(parts.gate_paths)
        rest |= {f"{GATES_FILE}/{p}": parts.gate(p) for p in parts.gates.items if p not in stacked}
    names = [HEADERS[name] for name in parts.headers]
    if rest:
        write_bytes(place / REST_FILE, safetensors.torch.save({k: t.clone() for k, t in rest.items()}))
        names.append(REST_FILE)
    return {name: sha256_file(place / name) for name in names}
