"""Pack a pool's folder into one file of stacks, unpack it, and append experts to it.

Everything is written, synced to disk, read back and compared before the manifest that names it: a process that is
killed leaves either the old pool or the new one.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import PoolError
from phatgoose.experts.adapters.peft_rules import check_drop
from phatgoose.experts.files.safe_folder import SafeFolder
from phatgoose.experts.files.safetensors_file import (
    Header,
    check_finite,
    read_header,
    read_tensor_file,
    write_tensors,
)
from phatgoose.experts.folder import read_record
from phatgoose.experts.manifest import (
    FORMAT_VERSION,
    PACKED_VERSION,
    expert_folder,
    lock,
    read_manifest,
    sweep,
)
from phatgoose.experts.names import CONFIG_FILE, GATES_FILE, HEADERS, MANIFEST, PEFT_WEIGHTS, REST_FILE
from phatgoose.experts.packed.expert import PackedExpert, PackedSource, gate_stack
from phatgoose.experts.packed.layout import layout_of
from phatgoose.experts.packed.open import SMALL_BYTES, PackedPoolReader, to_runs
from phatgoose.experts.packed.stack_file import StackShape, create_stacks, writing
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256_file, write_bytes, write_json

SPARE = 0.5
"""Room for further rows, as a share of the rows there are."""
_ROUND = 64


def pack(folder: str | Path, spare: float = SPARE) -> dict[str, str]:
    """Packs a pool's experts into one file of stacks; a packed pool is packed again, without unused rows.

    Args:
        spare: room for further rows, as a share of the rows there are. It takes no space on disk before it is used.

    Returns: the experts that stay folders beside the packed ones, and why.

    Raises:
        PoolError, ExpertError: an expert is damaged, the pool is empty, or `spare` is negative; nothing is changed.
        StorageError: no space or no permission; nothing is changed.
    """
    folder = Path(folder)
    if not 0 <= spare <= 100:
        raise PoolError(f"spare is {spare!r}, expected a number from 0 to 100.")
    with lock(folder):
        manifest = read_manifest(folder)
        _pack(folder, manifest, spare)
        return {e["name"]: why for e in manifest["experts"] if (why := _why_unpackable(e))}


def unpack(folder: str | Path) -> None:
    """Makes a packed pool one folder an expert again. Every file and the manifest are as before packing, to the byte.

    Raises:
        PoolError: it isn't packed, or a file wouldn't come out as it was; nothing is changed.
    """
    folder = Path(folder)
    with lock(folder):
        manifest = read_manifest(folder)
        if "packed" not in manifest:
            raise PoolError(f"{folder} is not packed.")
        reader, written = PackedPoolReader(folder, manifest), list[Path]()
        try:
            for entry in manifest["experts"]:
                if "packed" in entry:
                    source = reader.expert(expert_folder(folder, entry), entry).source
                    for name in _stacked_files(source.hashes):
                        source.write(name, source.folder)
                        written.append(source.folder / name)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        entries = [{k: v for k, v in e.items() if k != "packed"} for e in manifest["experts"]]
        plain = {k: v for k, v in manifest.items() if k != "packed"}
        plain |= {"version": FORMAT_VERSION, "experts": entries}
        write_json(folder / MANIFEST, plain)
        sweep(folder, plain)


def append(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Adds an expert, whose folder is there already, to a packed pool. The caller holds the lock.

    Its rows are written into the spare room; if that is too small, everything is packed again with more.
    """
    whole = {**manifest, "experts": [*manifest["experts"], entry]}
    if _why_unpackable(entry):
        write_json(folder / MANIFEST, whole)
        return
    # Without verification: other experts aren't touched, so they need not be sound.
    reader = PackedPoolReader(folder, manifest, verify=False)
    place = expert_folder(folder, entry)
    expert = PlainSource(place.path, entry)
    if not _has_room(reader, stack_shapes([expert])):
        _pack(folder, whole, SPARE)
        return
    used = dict(reader.used)
    with _swept_on_error(folder, manifest, [entry]):
        with writing(reader.file.path) as put:
            added = _write_expert(expert, entry, put, used)
        packed = {**manifest["packed"], "used": used}
        whole = {**manifest, "experts": [*manifest["experts"], added], "packed": packed}
        check_bytes(PackedPoolReader(folder, whole).expert(place, added).source)
    write_json(folder / MANIFEST, whole)
    sweep(folder, whole)


def check_packed(expert: PackedExpert) -> None:
    """Reads all of a packed expert: its bytes must have the manifest's sha256, and its values must be finite."""
    check_bytes(expert.source)
    if expert.signature is not None:
        _ = expert.signature.texts  # reads and checks all of it
    for values in (expert.tensors, expert.gates or {}):
        for key, tensor in values.items():
            check_finite(tensor, f"expert {expert.name!r} ({expert.folder}): {key}")


def check_bytes(source: PackedSource) -> None:
    """Compares the files that the stacks give back with their sha256 in the manifest."""
    for name in _stacked_files(source.hashes):
        digest = hashlib.sha256()
        for piece in source.original(name):
            digest.update(piece)
        source.check(name, digest.hexdigest())


def _pack(folder: Path, manifest: Mapping[str, Any], spare: float) -> None:
    """Writes all experts of the manifest, packed or not, into a new file, then the manifest that names it."""
    reader = PackedPoolReader(folder, manifest) if "packed" in manifest else None
    entries = {e["name"]: e for e in manifest["experts"] if not _why_unpackable(e)}
    if not entries:
        named = "".join(f": {e['name']!r} {_why_unpackable(e)}" for e in manifest["experts"][:1])
        raise PoolError(f"{folder} has no expert that can be packed{named}.")
    folders = {name: expert_folder(folder, entry) for name, entry in entries.items()}

    def inputs() -> Iterator[Source]:  # one at a time: a large pool's tensors don't fit into memory
        return (_source(folders[name], entry, reader) for name, entry in entries.items())

    path = folder / "packed" / f"stacks-{_next_number(folder)}.safetensors"
    with _swept_on_error(folder, manifest):
        create_stacks(path, stack_shapes(inputs(), spare))
        used: dict[str, int] = {}
        with writing(path) as put:
            pairs = zip(entries.items(), inputs(), strict=True)
            added = {name: _write_expert(expert, entry, put, used) for (name, entry), expert in pairs}
        index = {"file": str(path.relative_to(folder)), "used": used}
        whole = [added.get(e["name"], e) for e in manifest["experts"]]
        packed = {**manifest, "version": PACKED_VERSION, "experts": whole, "packed": index}
        # Read back what was written, before the manifest names it.
        written = PackedPoolReader(folder, packed)
        experts = [written.expert(folders[name], entry) for name, entry in added.items()]
        for expert in experts:
            check_bytes(expert.source)
        Pool(experts)  # refuses experts that don't go together
    write_json(folder / MANIFEST, packed)
    sweep(folder, packed)


@contextmanager
def _swept_on_error(
    folder: Path, manifest: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()
) -> Iterator[None]:
    """On an error, deletes what was written so far: all that the old manifest doesn't need."""
    try:
        yield
    except BaseException:
        sweep(folder, manifest, before)
        raise


class PlainSource:
    """An expert that isn't packed yet, read as a `PackedSource` is: tensors when they are used."""

    def __init__(self, folder: Path, entry: Mapping[str, Any]):
        self.folder = folder
        drop = check_drop(read_record(SafeFolder(folder)).get("provenance", {}).get("dropped", ()))
        config = SafeFolder(folder, links_checked=True).read_json(CONFIG_FILE, SMALL_BYTES)
        raw, header = read_header(folder / PEFT_WEIGHTS)
        self.layout = layout_of(config, header, None, str(folder), drop)
        self.headers = {PEFT_WEIGHTS: raw}
        self.gates: Header | None = None
        self.gate_index: Collection[str] = ()
        if GATES_FILE in entry["files"]:
            self.headers[GATES_FILE], self.gates = read_header(folder / GATES_FILE)
            self.gate_index = [
                p
                for p, item in self.gates.items.items()
                if item.dtype == torch.float32 and item.end > item.begin
            ]
        self._read = cache(lambda name: read_tensor_file(folder / name, empty=True).tensors)

    def tensor(self, key: str) -> Tensor:
        return self._read(PEFT_WEIGHTS)[key]

    def raw_gate(self, path: str) -> Tensor:
        return self._read(GATES_FILE)[path]


Source = PackedSource | PlainSource


def _source(folder: SafeFolder, entry: Mapping[str, Any], reader: PackedPoolReader | None) -> Source:
    """An expert from its own folder or, if it is packed, from the pool's file."""
    if reader is not None and "packed" in entry:
        return reader.expert(folder, entry).source
    return PlainSource(folder.path, entry)


def stack_shapes(experts: Iterable[Source], spare: float | None = None) -> dict[str, StackShape]:
    """The stacks these experts need: a module's A and B one after the other, all gates at the end.

    Args:
        spare: room for further rows, as a share; None for just the rows there are.
    """
    low: dict[str, StackShape] = {}
    gates: dict[str, StackShape] = {}
    for expert in experts:
        for pair in expert.layout.pairs.values():
            for name, width in zip((pair.down, pair.up), pair.widths, strict=True):
                rows = pair.rank + (low[name].rows if name in low else 0)
                low[name] = StackShape(pair.dtype, rows, width)
        items = {} if expert.gates is None else expert.gates.items
        for path in sorted(expert.gate_index):
            name, width = gate_stack(path), items[path].shape[0]
            gates[name] = StackShape(torch.float32, 1 + (gates[name].rows if name in gates else 0), width)

    def room(rows: int) -> int:
        return rows if spare is None else math.ceil(int(rows * (1 + spare)) / _ROUND) * _ROUND

    return {name: StackShape(s.dtype, room(s.rows), s.width) for name, s in (low | gates).items()}


def _has_room(reader: PackedPoolReader, shapes: Mapping[str, StackShape]) -> bool:
    """Whether a packed pool's stacks have room for rows of these shapes."""
    stacks = reader.file.stacks
    return all(
        reader.used.get(name, 0) + shape.rows <= reader.file.capacity(name)
        and (shape.dtype, shape.width) == (stacks[name].dtype, stacks[name].shape[1])
        for name, shape in shapes.items()
    )


def _write_expert(
    expert: Source, entry: Mapping[str, Any], put: Callable[[str, int, Tensor], None], used: dict[str, int]
) -> dict[str, Any]:
    """Writes an expert's rows after those in `used`, and its other files; returns its manifest entry."""
    starts, rows = [], []
    for pair in expert.layout.pairs.values():
        start = used.get(pair.down, 0)
        put(pair.down, start, expert.tensor(pair.key_a))
        put(pair.up, start, expert.tensor(pair.key_b).T)
        used[pair.down] = start + pair.rank
        starts.append(start)
    for path in sorted(expert.gate_index):
        row = used.get(gate_stack(path), 0)
        put(gate_stack(path), row, expert.raw_gate(path)[None])
        used[gate_stack(path)] = row + 1
        rows.append(row)
    files = _write_rest(expert) if isinstance(expert, PlainSource) else entry["packed"]["files"]
    return {**entry, "packed": {"rows": to_runs(starts), "gates": to_runs(rows), "files": dict(files)}}


def _write_rest(expert: PlainSource) -> dict[str, str]:
    """Writes headers and the tensors that are in no stack into the expert's own folder; returns the files' sha256."""
    place = expert.folder
    for name, raw in expert.headers.items():
        write_bytes(place / HEADERS[name], raw)
    rest = {name: expert.tensor(name.removeprefix(f"{PEFT_WEIGHTS}/")) for name in expert.layout.rest}
    if expert.gates is not None:
        stacked = set(expert.gate_index)
        rest |= {f"{GATES_FILE}/{p}": expert.raw_gate(p) for p in expert.gates.items if p not in stacked}
    names = [HEADERS[name] for name in expert.headers]
    if rest:
        write_tensors(place / REST_FILE, rest)
        names.append(REST_FILE)
    return {name: sha256_file(place / name) for name in names}


def _why_unpackable(entry: Mapping[str, Any]) -> str:
    """Why an expert can't be packed, or ""."""
    in_peft = PEFT_WEIGHTS in entry["files"]
    return "" if in_peft else "is an adapter in AdapterHub's format, which has no low-rank rows"


def _next_number(folder: Path) -> int:
    there = (re.fullmatch(r"stacks-(\d{1,9})\.safetensors", p.name) for p in (folder / "packed").glob("*"))
    return max((int(m[1]) for m in there if m), default=0) + 1


def _stacked_files(hashes: Mapping[str, str]) -> list[str]:
    """Those of an expert's files that the stacks hold."""
    return [name for name in HEADERS if name in hashes]
