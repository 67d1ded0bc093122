"""A pool: experts of one base, in memory and as a folder with a manifest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.expert import GATES_FILE, RECORD_FILE, Expert
from phatgoose.experts.peft import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.update import sizes_agree
from phatgoose.files import read_json, sha256_file, storage_errors, write_json
from phatgoose.fingerprints import check_same_base
from phatgoose.records import Fingerprint
from phatgoose.registry import unknown

MANIFEST = "pool.json"
FORMAT_VERSION = 1
_FOLDER = re.compile(r"experts/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, eq=False)
class Pool:
    """Experts of one base model, in order; names are unique. Immutable: adding or removing gives a new pool.

    Raises:
        PoolError: no experts, a name twice, or modules whose shapes disagree between experts.
        BaseModelError: two experts record different bases.
    """

    experts: tuple[Expert, ...]

    def __init__(self, experts: Sequence[Expert]):
        object.__setattr__(self, "experts", tuple(experts))
        if not self.experts:
            raise PoolError("a pool needs at least one expert.")
        seen: set[str] = set()
        for expert in self.experts:
            if expert.name in seen:
                raise PoolError(
                    f"two experts are named {expert.name!r}; rename one (--name, or expert.renamed in Python)."
                )
            seen.add(expert.name)
        self._check_shapes()
        known = [(e.name, e.base) for e in self.experts if e.base is not None]
        for name, base in known[1:]:
            check_same_base(known[0][1], base, f"experts {known[0][0]!r} and {name!r}")

    def _check_shapes(self) -> None:
        owners: dict[str, Expert] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for expert in self.experts:
            for path, update in expert.updates.items():
                first, known = owners.setdefault(path, expert), sizes.setdefault(path, (0, 0))
                found = (update.d_in, update.d_out)
                if (
                    not all(map(sizes_agree, known, found))
                    or update.embedding != first.updates[path].embedding
                ):
                    raise PoolError(
                        f"experts {first.name!r} and {expert.name!r} disagree about {path}: {known[0]} → {known[1]} and "
                        f"{update.d_in} → {update.d_out}. They can't be of one base."
                    )
                sizes[path] = (known[0] or found[0], known[1] or found[1])

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, name: str) -> Expert:
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise unknown("expert", name, self.names)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.experts)

    @cached_property
    def base(self) -> Fingerprint | None:
        """The base that the experts record; None if none of them does."""
        return next((e.base for e in self.experts if e.base is not None), None)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of all modules that any expert adapts, in the order the experts list them."""
        return tuple(dict.fromkeys(path for e in self.experts for path in e.updates))

    def add(self, expert: Expert) -> Pool:
        return Pool((*self.experts, expert))

    def remove(self, name: str) -> Pool:
        self[name]
        return Pool([e for e in self.experts if e.name != name])

    def save(self, folder: str | Path) -> Path:
        """Writes the pool; an existing pool folder becomes this one.

        Each expert's folder is written before the manifest that names it, and unused ones are deleted after, so that a
        killed process leaves either the old pool or the new one. Experts that are there already are not written again.

        Raises:
            PoolError: `folder` holds something else. StorageError: no space or no permission.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / MANIFEST).exists() and not _unfinished(folder):
            raise PoolError(f"{folder} exists and holds something else than a pool; choose another folder.")
        with storage_errors(folder):
            (folder / "experts").mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            kept = _entries(folder) if (folder / MANIFEST).exists() else []
            entries = [_place(folder, expert, kept) for expert in self.experts]
            _write_manifest(folder, entries, self.base)
            _sweep(folder, entries)
        return folder

    @staticmethod
    def load(folder: str | Path, *, verify: bool = True) -> Pool:
        """Reads a pool folder.

        Args:
            verify: compare every file with the sha256 in the manifest. Shapes, finiteness and bases are always checked.

        Raises:
            PoolError, ExpertError: naming the file, what was expected and what was found.
        """
        folder = Path(folder)
        experts, failures = [], []
        for entry in _entries(folder):
            try:
                place = _inside(folder, entry["folder"])
                if verify:
                    _verify_files(place, entry)
                experts.append(Expert.load(place, name=entry["name"]))
            except PhatgooseError as error:
                failures.append(error)
        if len(failures) > 1:
            raise PoolError(
                "\n".join([f"{len(failures)} experts of {folder} can't be loaded:", *map(str, failures)])
            )
        if failures:
            raise failures[0]
        if not experts:
            raise PoolError(f"{folder} is an empty pool; add an expert with `phatgoose pool add`.")
        return Pool(experts)

    def warnings(self) -> list[str]:
        """What a user should know about this pool although it is valid."""
        found = []
        for expert in self.experts:
            if expert.base is None:
                found.append(
                    f"{expert.name}: records no base, so it can't be checked that it was trained on this one."
                )
            if expert.gates is None:
                found.append(
                    f"{expert.name}: has no gates; PHATGOOSE can't route to it until they are trained (`phatgoose gate`)."
                )
            else:
                flat = [path for path, gate in expert.gates.items() if float(gate.std(correction=0)) < 1e-6]
                if flat:
                    found.append(
                        f"{expert.name}: the gates of {len(flat)} modules are constant (first: {flat[0]}), so they say nothing."
                    )
        alone: dict[str, list[str]] = {}
        if len(self.experts) > 1:
            for path in self.modules:
                owners = [e.name for e in self.experts if path in e.updates]
                if len(owners) == 1:
                    alone.setdefault(owners[0], []).append(path)
        for name, paths in alone.items():
            found.append(
                f"{name}: the only expert at {len(paths)} modules (first: {paths[0]}); there it competes only with the null candidate."
            )
        for i, one in enumerate(self.experts):
            for other in self.experts[:i]:
                if one.tensors.keys() == other.tensors.keys() and all(
                    torch.equal(t, other.tensors[k]) for k, t in one.tensors.items()
                ):
                    found.append(
                        f"{other.name} and {one.name}: the same adapter twice; together they take both places of a top-2."
                    )
        return found


def add_to_folder(folder: str | Path, expert: Expert) -> None:
    """Adds one expert to a pool on disk (a new pool if there is none), writing nothing but it and the manifest.

    Raises:
        PoolError: its name is taken, or its modules disagree. BaseModelError: it is of another base.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        Pool([expert]).save(folder)
        return
    with _lock(folder):
        entries = _entries(folder)
        pool = Pool.load(folder, verify=False).add(expert) if entries else Pool([expert])
        entries = [*entries, _place(folder, expert, entries)]
        _write_manifest(folder, entries, pool.base)


def remove_from_folder(folder: str | Path, name: str) -> None:
    """Removes one expert from a pool on disk; the others need not be readable."""
    folder = Path(folder)
    with _lock(folder):
        entries = _entries(folder)
        if name not in [e["name"] for e in entries]:
            raise unknown("expert", name, [e["name"] for e in entries])
        kept = [e for e in entries if e["name"] != name]
        manifest = read_json(folder / MANIFEST, PoolError)
        write_json(folder / MANIFEST, {**manifest, "experts": kept})
        _sweep(folder, kept)


def _unfinished(folder: Path) -> bool:
    """Whether a folder without a manifest holds nothing but what a killed save() leaves."""
    return folder.is_dir() and all(
        p.name in ("experts", ".lock") or p.name.startswith(f".{MANIFEST}.") for p in folder.iterdir()
    )


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / ".lock", timeout=600)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The manifest's experts, checked to be well formed."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise PoolError(f"{folder} is not a folder; expected a pool made by `phatgoose pool create`.")
    manifest = read_json(path, PoolError)
    if not isinstance(manifest, dict) or manifest.get("format") != "phatgoose-pool":
        raise PoolError(f'{path} is not a pool\'s manifest (no "format": "phatgoose-pool").')
    if manifest.get("version") != FORMAT_VERSION:
        raise PoolError(
            f"{path} has format version {manifest.get('version')!r}; this phatgoose reads {FORMAT_VERSION}. Update phatgoose."
        )
    entries = manifest.get("experts")
    if not isinstance(entries, list):
        raise PoolError(f"{path}: experts is not a list.")
    for i, entry in enumerate(entries):
        valid = isinstance(entry, dict) and all(
            isinstance(entry.get(k), t) for k, t in (("name", str), ("folder", str), ("files", dict))
        )
        if not valid:
            raise PoolError(f"{path}: expert {i} lacks a name, a folder or its files' hashes.")
        if not _FOLDER.fullmatch(entry["folder"]):
            raise PoolError(
                f"{path}: expert {entry['name']!r} lies in {entry['folder']!r}, expected experts/NAME inside the pool."
            )
    return entries


def _inside(folder: Path, relative: str) -> Path:
    place = folder / relative
    root = folder.resolve()
    for path in (place, *(place / n for n in (CONFIG_FILE, WEIGHTS_FILE, GATES_FILE, RECORD_FILE))):
        if path.exists() and not path.resolve().is_relative_to(root):
            raise PoolError(f"{path} is a link that leads out of the pool's folder; it is not followed.")
    return place


def _verify_files(place: Path, entry: dict[str, Any]) -> None:
    allowed = {CONFIG_FILE, WEIGHTS_FILE, GATES_FILE, RECORD_FILE}
    for name, expected in entry["files"].items():
        if name not in allowed:
            raise PoolError(f"{place}: the manifest lists a file {name!r}, which no expert has.")
        if not (place / name).is_file():
            raise PoolError(f"{place / name} is missing, although the pool's manifest lists it.")
        found = sha256_file(place / name)
        if found != expected:
            raise PoolError(
                f"{place / name} is damaged or was changed: expected sha256 {expected}, found {found}."
            )
    for name in allowed - entry["files"].keys():
        if (place / name).exists():
            raise PoolError(
                f"{place / name} is not listed in the pool's manifest; was it added by hand? Use `phatgoose pool add`."
            )


def _place(folder: Path, expert: Expert, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest entry of `expert`, whose folder is written unless the very same files are there already."""
    taken = {e["folder"] for e in kept}
    for entry in kept:
        if entry["name"] == expert.name and _stands(folder / entry["folder"], entry, expert):
            return entry
    relative, number = f"experts/{expert.name}", 1
    while relative in taken or (folder / relative).exists():
        number += 1
        relative = f"experts/{expert.name}.{number}"
    place = expert.save(folder / relative)
    names = [n for n in (CONFIG_FILE, WEIGHTS_FILE, GATES_FILE, RECORD_FILE) if (place / n).exists()]
    return {"name": expert.name, "folder": relative, "files": {n: sha256_file(place / n) for n in names}}


def _stands(place: Path, entry: dict[str, Any], expert: Expert) -> bool:
    """Whether `place` already holds this very expert, whole."""
    try:
        _verify_files(place, entry)
        return Expert.load(place).equals(expert)
    except PhatgooseError:
        return False


def _write_manifest(folder: Path, entries: list[dict[str, Any]], base: Fingerprint | None) -> None:
    manifest = {
        "format": "phatgoose-pool",
        "version": FORMAT_VERSION,
        "base": base.to_json() if base else None,
        "experts": entries,
    }
    write_json(folder / MANIFEST, manifest)


def _sweep(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Deletes folders below experts/ that the manifest doesn't name: removed experts, and what a killed process left."""
    named = {e["folder"] for e in entries}
    for path in (folder / "experts").iterdir():
        if f"experts/{path.name}" not in named and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
