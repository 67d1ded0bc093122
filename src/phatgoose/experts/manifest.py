"""A pool's folder: its manifest, and the experts' folders below it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from phatgoose.errors import PhatgooseError, PoolError, brief
from phatgoose.experts.card import write_pool_card
from phatgoose.experts.card_facts import Facts, read_object
from phatgoose.experts.expert import GATES_FILE, RECORD_FILE, Expert
from phatgoose.experts.formats import WEIGHTS_FILES
from phatgoose.experts.packed import HEADERS, REST_FILE
from phatgoose.experts.peft import CONFIG_FILE
from phatgoose.files import read_json, sha256_file
from phatgoose.records import Fingerprint, HubSource

MANIFEST = "pool.json"
FORMAT_VERSION, PACKED_VERSION = 1, 2
_FILES = (CONFIG_FILE, *WEIGHTS_FILES, GATES_FILE, RECORD_FILE)
_PACKED_FILES = (*HEADERS.values(), REST_FILE)
_FOLDER = re.compile(r"experts/[A-Za-z0-9][A-Za-z0-9._-]*")


def unfinished(folder: Path) -> bool:
    """Whether a folder without a manifest holds nothing but what a killed save() leaves."""
    return folder.is_dir() and all(
        p.name in ("experts", ".lock") or p.name.startswith(f".{MANIFEST}.") for p in folder.iterdir()
    )


def lock(folder: Path) -> FileLock:
    """Held while the pool is written."""
    return FileLock(folder / ".lock", timeout=600)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A pool's manifest, its list of experts checked to be well formed."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise PoolError(f"{folder} is not a folder; expected a pool made by `phatgoose pool create`.")
    manifest = read_json(path, PoolError)
    if not isinstance(manifest, dict) or manifest.get("format") != "phatgoose-pool":
        raise PoolError(f'{path} is not a pool\'s manifest (no "format": "phatgoose-pool").')
    expected = PACKED_VERSION if "packed" in manifest else FORMAT_VERSION
    if manifest.get("version") != expected:
        raise PoolError(
            f"{path} has format version {manifest.get('version')!r}; this phatgoose reads {FORMAT_VERSION} and, of packed pools, "
            f"{PACKED_VERSION}. Update phatgoose."
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
        try:
            origin_of(entry)
        except (KeyError, TypeError, ValueError) as cause:
            raise PoolError(
                f"{path}: the source of expert {entry['name']!r} is {brief(entry['source'])}: {cause}."
            ) from cause
    return manifest


def origin_of(entry: Mapping[str, Any]) -> HubSource | None:
    """Where on the Hub the expert of a manifest's entry was fetched from."""
    return HubSource.from_json(entry["source"]) if entry.get("source") is not None else None


def inside(folder: Path, relative: str) -> Path:
    place = folder / relative
    root = folder.resolve()
    for path in (place, *(place / n for n in (*_FILES, *_PACKED_FILES))):
        if path.exists() and not path.resolve().is_relative_to(root):
            raise PoolError(f"{path} is a link that leads out of the pool's folder; it is not followed.")
    return place


def verify_files(place: Path, entry: dict[str, Any]) -> None:
    allowed = set(_FILES)
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


def place_expert(folder: Path, expert: Expert, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest entry of `expert`, whose folder is written unless the very same files are there already."""
    taken = {e["folder"] for e in kept}
    for entry in kept:
        if entry["name"] == expert.name and _stands(folder / entry["folder"], entry, expert):
            return _entry(expert, entry["folder"], entry["files"])
    relative, number = f"experts/{expert.name}", 1
    while relative in taken or (folder / relative).exists():
        number += 1
        relative = f"experts/{expert.name}.{number}"
    place = expert.save(folder / relative)
    names = [n for n in _FILES if (place / n).exists()]
    return _entry(expert, relative, {n: sha256_file(place / n) for n in names})


def _entry(expert: Expert, relative: str, files: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": expert.name, "folder": relative, "files": files}
    return entry if expert.origin is None else {**entry, "source": expert.origin.to_json()}


def _stands(place: Path, entry: dict[str, Any], expert: Expert) -> bool:
    """Whether `place` already holds this very expert, whole."""
    try:
        verify_files(place, entry)
        return Expert.load(place).equals(expert)
    except PhatgooseError:
        return False


def new_manifest(entries: list[dict[str, Any]], base: Fingerprint | None) -> dict[str, Any]:
    return {
        "format": "phatgoose-pool",
        "version": FORMAT_VERSION,
        "base": base.to_json() if base else None,
        "experts": entries,
    }


def describe(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the pool's README.md, from the manifest and the experts' small files; what can't be read is left out."""
    facts = [
        Facts(
            entry["name"],
            read_object(folder / entry["folder"] / CONFIG_FILE),
            read_object(folder / entry["folder"] / RECORD_FILE).get("provenance"),
            GATES_FILE in entry["files"],
            origin=str(origin_of(entry) or ""),
        )
        for entry in manifest["experts"]
    ]
    base = manifest.get("base")
    spec = base.get("spec") if isinstance(base, dict) else None
    places = [entry["folder"] for entry in manifest["experts"]]
    write_pool_card(folder, list(zip(facts, places, strict=True)), spec if isinstance(spec, str) else None)


def sweep(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Deletes what the manifest doesn't name: removed experts, the other form of packed and unpacked ones, and what a killed
    process left."""
    entries = {e["folder"]: e for e in manifest["experts"]}
    for path in (folder / "experts").iterdir():
        entry = entries.get(f"experts/{path.name}")
        if entry is None and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif entry is not None:
            for name in HEADERS if "packed" in entry else _PACKED_FILES:
                (path / name).unlink(missing_ok=True)
    if (folder / "packed").is_dir() and not (folder / "packed").is_symlink():
        for path in (folder / "packed").iterdir():
            if f"packed/{path.name}" != manifest.get("packed", {}).get("file"):
                path.unlink(missing_ok=True)
        if "packed" not in manifest:
            (folder / "packed").rmdir()
