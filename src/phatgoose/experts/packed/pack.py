"""Packing a pool on disk and unpacking it again, and adding to a packed one without rewriting the rest.

Whatever is written stands on disk, and was read back and compared, before the manifest that names it: a killed process leaves
the old pool or the new one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import PoolError
from phatgoose.experts.files.safetensors_file import check_finite
from phatgoose.experts.manifest import FORMAT_VERSION, PACKED_VERSION, inside, lock, read_manifest, sweep
from phatgoose.experts.names import HEADERS, MANIFEST, PEFT_WEIGHTS
from phatgoose.experts.packed.expert import PackedExpert, Source
from phatgoose.experts.packed.open import PackedFolder
from phatgoose.experts.packed.parts import keep_beside, parts_of, shapes_of, write_rows
from phatgoose.experts.packed.stack_file import create_stacks, writing
from phatgoose.experts.pool import Pool
from phatgoose.files import write_json

SPARE = 0.5
"""Room for further rows, as a share of those there."""


def pack(folder: str | Path, spare: float = SPARE) -> dict[str, str]:
    """Packs a pool's experts into one file of stacks; of a packed pool, everything again, without the rows of removed experts.

    `spare`: room for further rows as a share of those there; it takes no space on disk before it is used.
    Returns: the experts that stay as they are, folders beside the packed ones, and why.

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
        return {e["name"]: why for e in manifest["experts"] if (why := _why_not(e))}


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
        manifest = {k: v for k, v in manifest.items() if k != "packed"} | {
            "version": FORMAT_VERSION,
            "experts": plain,
        }
        write_json(folder / MANIFEST, manifest)
        sweep(folder, manifest)


def append(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Adds an expert, whose folder stands below a packed pool and isn't in its manifest yet. The caller holds the lock.

    Only its rows are written, into the spare room; where that is too small, everything is packed again with more.
    """
    if _why_not(entry):
        write_json(folder / MANIFEST, {**manifest, "experts": [*manifest["experts"], entry]})
        return
    opened = PackedFolder(folder, manifest, verify=False)
    place = inside(folder, entry["folder"])
    parts = parts_of(place, entry, None)
    used = dict(opened.used)
    whole = {**manifest, "experts": [*manifest["experts"], entry]}
    if any(
        used.get(name, 0) + shape.rows > opened.file.capacity(name)
        or (shape.dtype, shape.width) != (opened.file.stacks[name].dtype, opened.file.stacks[name].shape[1])
        for name, shape in shapes_of([parts], 0, rounded=False).items()
    ):
        _pack(folder, whole, SPARE)
        return
    try:
        with writing(opened.file.path) as writer:
            spots = write_rows(parts, writer, used)
        added = {**entry, "packed": spots | {"files": keep_beside(place, parts)}}
        index = {**manifest["packed"], "used": used}
        whole = {**manifest, "experts": [*manifest["experts"], added], "packed": index}
        _check_bytes(PackedFolder(folder, whole).expert(place, added).source)
    except BaseException:
        sweep(folder, manifest, [entry])
        raise
    write_json(folder / MANIFEST, whole)
    sweep(folder, whole)


def _pack(folder: Path, manifest: Mapping[str, Any], spare: float) -> None:
    """Writes all experts of the manifest, packed or not, into a new file, then the manifest that names it."""
    opened = PackedFolder(folder, manifest) if "packed" in manifest else None
    fit = [e for e in manifest["experts"] if not _why_not(e)]
    if not fit:
        named = "".join(f": {e['name']!r} {_why_not(e)}" for e in manifest["experts"][:1])
        raise PoolError(f"{folder} has no expert that can be packed{named}.")
    places = {e["name"]: inside(folder, e["folder"]) for e in fit}
    path = folder / "packed" / f"stacks-{_next_number(folder)}.safetensors"
    try:
        shapes = shapes_of((parts_of(places[e["name"]], e, opened) for e in fit), spare)
        create_stacks(path, shapes)
        used: dict[str, int] = {}
        entries: dict[str, dict[str, Any]] = {}
        with writing(path) as writer:
            for entry in fit:  # one at a time: a large pool's tensors don't fit into memory
                parts = parts_of(places[entry["name"]], entry, opened)
                spots = write_rows(parts, writer, used)
                kept = keep_beside(places[entry["name"]], parts)
                entries[entry["name"]] = {**entry, "packed": spots | {"files": kept}}
        index = {"file": str(path.relative_to(folder)), "used": used}
        whole = [entries.get(e["name"], e) for e in manifest["experts"]]
        packed = {**manifest, "version": PACKED_VERSION, "experts": whole, "packed": index}
        check = PackedFolder(folder, packed)
        experts = [check.expert(places[name], entry) for name, entry in entries.items()]
        for expert in experts:
            _check_bytes(expert.source)
        Pool(experts)
    except BaseException:
        sweep(folder, manifest)
        raise
    write_json(folder / MANIFEST, packed)
    sweep(folder, packed)


def _why_not(entry: Mapping[str, Any]) -> str:
    """Why an expert can't be packed, or ""."""
    return (
        ""
        if PEFT_WEIGHTS in entry["files"]
        else "is an adapter in AdapterHub's format, which has no low-rank rows"
    )


def _next_number(folder: Path) -> int:
    there = (re.fullmatch(r"stacks-(\d{1,9})\.safetensors", p.name) for p in (folder / "packed").glob("*"))
    return max((int(m[1]) for m in there if m), default=0) + 1


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


def check_packed(expert: PackedExpert) -> None:
    """Reads everything of a packed expert: its bytes must have the sha256 of the manifest, its values must be finite.

    Raises:
        PoolError, ExpertError: what is damaged.
    """
    _check_bytes(expert.source)
    if expert.signature is not None:
        _ = expert.signature.texts  # reads and checks all of it
    for values in (expert.tensors, expert.gates or {}):
        for key, tensor in values.items():
            check_finite(tensor, f"expert {expert.name!r} ({expert.folder}): {key}")
