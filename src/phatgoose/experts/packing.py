"""Packing a pool on disk and unpacking it again, and adding to a packed one without rewriting the rest.

Whatever is written stands on disk, and was read back and compared, before the manifest that names it: a killed process leaves
the old pool or the new one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from phatgoose.errors import ExpertError, PhatgooseError, PoolError
from phatgoose.experts.expert import GATES_FILE, read_record
from phatgoose.experts.headers import Header, read_header
from phatgoose.experts.layout import Layout, layout_of
from phatgoose.experts.manifest import MANIFEST, inside, lock, read_manifest, sweep
from phatgoose.experts.opening import PackedFolder, runs
from phatgoose.experts.packed import HEADERS, REST_FILE, PackedExpert, Source, gate_stack
from phatgoose.experts.peft import CONFIG_FILE, WEIGHTS_FILE, read_tensors
from phatgoose.experts.peft_rules import check_drop
from phatgoose.experts.pool import Pool
from phatgoose.experts.stacks import Shape, Writer, create_stacks, writing
from phatgoose.files import read_json, sha256_file, write_bytes, write_json

SPARE = 0.5
"""Room for further rows, as a share of those there."""
_ROUND = 64


def pack(folder: str | Path, spare: float = SPARE) -> None:
    """Packs a pool's experts into one file of stacks; of a packed pool, everything again, without the rows of removed experts.

    `spare`: room for further rows as a share of those there; it takes no space on disk before it is used.

    Raises:
        PoolError, ExpertError: an expert is damaged, the pool is empty, or `spare` is negative; nothing is changed.
        StorageError: no space or no permission; nothing is changed.
    """
    folder = Path(folder)
    if not 0 <= spare <= 100:
        raise PoolError(f"spare is {spare!r}, expected a number from 0 to 100.")
    with lock(folder):
        manifest = read_manifest(folder)
        if not manifest["experts"]:
            raise PoolError(f"{folder} is an empty pool; there is nothing to pack.")
        _pack(folder, manifest, spare)


def unpack(folder: str | Path) -> None:
    """Makes a packed pool one folder an expert again, every file and the manifest as they were before packing, to the byte.

    Raises:
        PoolError: it isn't packed, or a file wouldn't come out as it was; nothing is changed.
    """
    folder = Path(folder)
    with lock(folder):
        manifest = read_manifest(folder)
        if "packed" not in manifest:
            raise PoolError(f"{folder} is not packed.")
        opened, written = PackedFolder(folder, manifest), list[Path]()
        try:
            for entry in _packed(manifest):
                place = inside(folder, entry["folder"])
                source = opened.expert(place, entry).source
                for name in _files(source.hashes):
                    source.write(name, place)
                    written.append(place / name)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        plain = [{k: v for k, v in e.items() if k != "packed"} for e in manifest["experts"]]
        manifest = {k: v for k, v in manifest.items() if k != "packed"} | {"version": 1, "experts": plain}
        write_json(folder / MANIFEST, manifest)
        sweep(folder, manifest)


def append(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Adds an expert, whose folder stands below a packed pool and isn't in its manifest yet. The caller holds the lock.

    Only its rows are written, into the spare room; where that is too small, everything is packed again with more.
    """
    opened = PackedFolder(folder, manifest, verify=False)
    place = inside(folder, entry["folder"])
    parts = _parts(place, entry, None)
    used = dict(opened.used)
    whole = {**manifest, "experts": [*manifest["experts"], entry]}
    if any(
        used.get(name, 0) + shape.rows > opened.file.capacity(name)
        or (shape.dtype, shape.width) != (opened.file.stacks[name].dtype, opened.file.stacks[name].shape[1])
        for name, shape in _shapes([parts], 0, rounded=False).items()
    ):
        _pack(folder, whole, SPARE)
        return
    with writing(opened.file.path) as writer:
        added = {**entry, "packed": _write(parts, writer, used) | {"files": _keep(place, parts)}}
    whole = {
        **manifest,
        "experts": [*manifest["experts"], added],
        "packed": {**manifest["packed"], "used": used},
    }
    _check_bytes(PackedFolder(folder, whole).expert(place, added).source)
    write_json(folder / MANIFEST, whole)
    sweep(folder, whole)


def verify_folder(folder: str | Path) -> Pool:
    """Loads a pool and reads all of it: of a packed one, every expert's bytes against their sha256, and every value.

    Raises:
        PoolError, ExpertError: what `Pool.load` raises, and every expert whose rows are damaged or not finite.
    """
    pool = Pool.load(folder)
    failures: list[PhatgooseError] = []
    for expert in pool.experts:
        if isinstance(expert, PackedExpert):
            try:
                _check_bytes(expert.source)
                _check_finite(expert)
            except PhatgooseError as error:
                failures.append(error)
    if len(failures) > 1:
        raise PoolError("\n".join([f"{len(failures)} experts of {folder} are damaged:", *map(str, failures)]))
    if failures:
        raise failures[0]
    return pool


@dataclass(frozen=True, eq=False)
class _Parts:
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


def _parts(place: Path, entry: Mapping[str, Any], opened: PackedFolder | None) -> _Parts:
    if opened is not None and "packed" in entry:
        source = opened.expert(place, entry).source
        paths = sorted(source.gate_rows)
        return _Parts(
            source.layout, source.gates, paths, source.tensor, source.raw_gate, {}, entry["packed"]["files"]
        )
    drop = check_drop(read_record(place).get("provenance", {}).get("dropped", ()))
    if WEIGHTS_FILE not in entry["files"]:
        raise PoolError(
            f"expert {entry['name']!r} is an adapter in AdapterHub's format, which a packed pool can't hold: leave the pool as it is."
        )
    raw, header = read_header(place / WEIGHTS_FILE)
    layout = layout_of(read_json(place / CONFIG_FILE, ExpertError), header, None, str(place), drop)
    headers, gates, paths = {WEIGHTS_FILE: raw}, None, list[str]()
    if GATES_FILE in entry["files"]:
        headers[GATES_FILE], gates = read_header(place / GATES_FILE)
        paths = sorted(
            p for p, item in gates.items.items() if item.dtype == torch.float32 and item.end > item.begin
        )
    weights, vectors = (
        cache(partial(read_tensors, place / name)) for name in HEADERS
    )  # read when used, once
    return _Parts(layout, gates, paths, lambda k: weights()[k], lambda p: vectors()[p], headers, None)


def _pack(folder: Path, manifest: Mapping[str, Any], spare: float) -> None:
    """Writes all experts of the manifest, packed or not, into a new file, then the manifest that names it."""
    opened = PackedFolder(folder, manifest) if "packed" in manifest else None
    places = {e["name"]: inside(folder, e["folder"]) for e in manifest["experts"]}
    path = folder / "packed" / f"stacks-{_next_number(folder)}.safetensors"
    try:
        shapes = _shapes((_parts(places[e["name"]], e, opened) for e in manifest["experts"]), spare)
        create_stacks(path, shapes)
        used: dict[str, int] = {}
        entries = []
        with writing(path) as writer:
            for entry in manifest[
                "experts"
            ]:  # one at a time: the tensors of a large pool don't fit into memory
                parts = _parts(places[entry["name"]], entry, opened)
                spots = _write(parts, writer, used)
                entries.append({**entry, "packed": spots | {"files": _keep(places[entry["name"]], parts)}})
        index = {"file": str(path.relative_to(folder)), "used": used}
        packed = {**manifest, "version": 2, "experts": entries, "packed": index}
        check = PackedFolder(folder, packed)
        experts = [check.expert(places[entry["name"]], entry) for entry in entries]
        for expert in experts:
            _check_bytes(expert.source)
        check.check_overlaps()
        Pool(experts)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    write_json(folder / MANIFEST, packed)
    sweep(folder, packed)


def _next_number(folder: Path) -> int:
    there = (re.fullmatch(r"stacks-(\d{1,9})\.safetensors", p.name) for p in (folder / "packed").glob("*"))
    return max((int(m[1]) for m in there if m), default=0) + 1


def _shapes(experts: Iterable[_Parts], spare: float, *, rounded: bool = True) -> dict[str, Shape]:
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


def _write(parts: _Parts, writer: Writer, used: dict[str, int]) -> dict[str, Any]:
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


def _keep(place: Path, parts: _Parts) -> dict[str, str]:
    """Writes what the stacks don't hold of an expert beside its config; returns the files' sha256."""
    if parts.packed_files is not None:
        return dict(parts.packed_files)
    for name, raw in parts.headers.items():
        write_bytes(place / HEADERS[name], raw)
    rest = {
        f"{WEIGHTS_FILE}/{k}": parts.tensor(k)
        for k in parts.layout.header.items
        if k not in parts.layout.spots
    }
    if parts.gates is not None:
        stacked = set(parts.gate_paths)
        rest |= {f"{GATES_FILE}/{p}": parts.gate(p) for p in parts.gates.items if p not in stacked}
    names = [HEADERS[name] for name in parts.headers]
    if rest:
        write_bytes(place / REST_FILE, safetensors.torch.save({k: t.clone() for k, t in rest.items()}))
        names.append(REST_FILE)
    return {name: sha256_file(place / name) for name in names}


def _files(hashes: Mapping[str, str]) -> list[str]:
    return [name for name in HEADERS if name in hashes]


def _packed(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in manifest["experts"] if "packed" in entry]


def _check_bytes(source: Source) -> None:
    """Compares the sha256 of what the stacks give back with the manifest's."""
    for name in _files(source.hashes):
        digest = hashlib.sha256()
        for piece in source.original(name):
            digest.update(piece)
        source.check(name, digest.hexdigest())


def _check_finite(expert: PackedExpert) -> None:
    for values in (expert.tensors, expert.gates or {}):
        for key, tensor in values.items():
            if not torch.isfinite(tensor.float()).all():
                raise ExpertError(
                    f"expert {expert.name!r} ({expert.folder}): {key} has values that are NaN or infinite."
                )
