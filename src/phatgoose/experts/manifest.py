"""A pool's folder: its manifest, and the experts' folders below it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from phatgoose.errors import ExpertError, PoolError, brief
from phatgoose.experts.names import (
    EXPERT_FILES,
    HEADERS,
    MANIFEST,
    PACKED_FILES,
    check_name,
)
from phatgoose.files import inside as in_folder
from phatgoose.files import is_folder, read_json, sha256_file, storage_errors
from phatgoose.memory import available_bytes
from phatgoose.records import Fingerprint, HubSource

LOCK_SECONDS = 600.0
FORMAT_VERSION, PACKED_VERSION = 1, 2
_FOLDER = re.compile(r"experts/[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def unfinished(folder: Path) -> bool:
    """Whether a folder without a manifest holds nothing but what a killed save() leaves, and experts: which are left alone."""
    return folder.is_dir() and all(
        p.name in ("experts", ".lock") or p.name.startswith(f".{MANIFEST}.") for p in folder.iterdir()
    )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Held while the pool is written.

    Raises:
        PoolError: another process holds it for ten minutes, or it is a link. StorageError: the folder can't be written.
    """
    _check_own(folder)
    held = FileLock(folder / ".lock", timeout=LOCK_SECONDS)
    try:
        with storage_errors(folder / ".lock"):
            held.acquire()
    except Timeout as cause:
        raise PoolError(
            f"{folder} has been held by another process for {LOCK_SECONDS:g} seconds: wait until it is done, or end it."
        ) from cause
    try:
        yield
    finally:
        held.release()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A pool's manifest, its list of experts checked to be well formed and to name nothing outside the pool.

    Raises:
        PoolError: what is wrong with it.
    """
    path = folder / MANIFEST
    if not is_folder(folder, PoolError):
        raise PoolError(f"{folder} is not a folder; expected a pool made by `phatgoose pool create`.")
    _check_own(folder)
    manifest = read_json(in_folder(folder, MANIFEST, PoolError), PoolError)
    if not isinstance(manifest, dict) or manifest.get("format") != "phatgoose-pool":
        raise PoolError(f'{path} is not a pool\'s manifest (no "format": "phatgoose-pool").')
    expected = PACKED_VERSION if "packed" in manifest else FORMAT_VERSION
    if manifest.get("version") != expected:
        raise PoolError(
            f"{path} has format version {brief(manifest.get('version'))}; this phatgoose reads {FORMAT_VERSION} and, of packed pools, "
            f"{PACKED_VERSION}. Update phatgoose."
        )
    entries = manifest.get("experts")
    if not isinstance(entries, list):
        raise PoolError(f"{path}: experts is not a list.")
    seen: set[str] = set()
    for i, entry in enumerate(entries):
        _check_entry(entry, f"{path}: expert {i}")
        if twice := seen & {entry["name"], entry["folder"]}:
            raise PoolError(f"{path}: two experts are at {twice.pop()!r}.")
        seen |= {entry["name"], entry["folder"]}
    return manifest


def _check_entry(entry: Any, where: str) -> None:
    valid = isinstance(entry, dict) and all(
        isinstance(entry.get(k), t) for k, t in (("name", str), ("folder", str), ("files", dict))
    )
    if not valid:
        raise PoolError(f"{where} lacks a name, a folder or its files' hashes.")
    try:
        check_name(entry["name"])
    except ExpertError as cause:
        raise PoolError(f"{where}: {cause}") from cause
    where += f" ({entry['name']})"
    if not _FOLDER.fullmatch(entry["folder"]):
        raise PoolError(f"{where} lies in {brief(entry['folder'])}, expected experts/NAME inside the pool.")
    packed = entry.get("packed")
    more = packed.get("files") if isinstance(packed, dict) else None
    for name, digest in (*entry["files"].items(), *(more.items() if isinstance(more, dict) else ())):
        if name not in (*EXPERT_FILES, *PACKED_FILES):
            raise PoolError(f"{where}: the manifest lists a file {brief(name)}, which no expert has.")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise PoolError(f"{where}: the sha256 of {name} is {brief(digest)}, expected 64 hex digits.")
    try:
        origin_of(entry)
    except (KeyError, TypeError, ValueError) as cause:
        raise PoolError(f"{where}: its source is {brief(entry['source'])}: {cause}.") from cause


def _check_own(folder: Path) -> None:
    """Refuses a pool whose own parts are links: what they lead to would be read, written and swept as if it were the pool's."""
    for name in ("experts", "packed", ".lock"):
        try:
            linked = (folder / name).is_symlink()
        except OSError as cause:
            raise PoolError(f"{folder} can't be read: {cause.strerror}.") from cause
        if linked:
            raise PoolError(
                f"{folder / name} is a link, which is not followed: it could lead out of the pool's folder. Put the folder itself there."
            )


def origin_of(entry: Mapping[str, Any]) -> HubSource | None:
    """Where on the Hub the expert of a manifest's entry was fetched from."""
    return HubSource.from_json(entry["source"]) if entry.get("source") is not None else None


def inside(folder: Path, relative: str) -> Path:
    place = folder / relative
    root = folder.resolve()
    try:
        for path in (place, *(place / n for n in (*EXPERT_FILES, *PACKED_FILES))):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise PoolError(f"{path} is a link that leads out of the pool's folder; it is not followed.")
    except (OSError, RuntimeError) as cause:  # links in a circle
        raise PoolError(f"{place} can't be read: {cause}") from cause
    return place


def verify_files(place: Path, entry: dict[str, Any]) -> None:
    """Compares every file of an expert with its sha256 in the manifest.

    Raises:
        PoolError: one is damaged, missing, not listed, or larger than this machine's free memory.
    """
    allowed = set(EXPERT_FILES)
    for name, expected in entry["files"].items():
        if name not in allowed:
            raise PoolError(f"{place}: the manifest lists a file {name!r}, which no expert has.")
        if not os.path.lexists(place / name):
            raise PoolError(f"{place / name} is missing, although the pool's manifest lists it.")
        found = sha256_file(place / name, PoolError, available_bytes())
        if found != expected:
            raise PoolError(
                f"{place / name} is damaged or was changed: expected sha256 {expected}, found {found}."
            )
    for name in allowed - entry["files"].keys():
        if os.path.lexists(place / name):
            raise PoolError(
                f"{place / name} is not listed in the pool's manifest; was it added by hand? Use `phatgoose pool add`."
            )


def new_manifest(entries: list[dict[str, Any]], base: Fingerprint | None) -> dict[str, Any]:
    return {
        "format": "phatgoose-pool",
        "version": FORMAT_VERSION,
        "base": base.to_json() if base else None,
        "experts": entries,
    }


def sweep(folder: Path, manifest: Mapping[str, Any], before: Iterable[Mapping[str, Any]] = ()) -> None:
    """Deletes experts that were in the pool (the entries `before`) and aren't in its manifest, the other form of packed and unpacked
    ones, and what a killed process has half written. Folders that never were the pool's own are left alone."""
    entries = {e["folder"]: e for e in manifest["experts"]}
    gone = {e["folder"] for e in before} - entries.keys()
    for path in (folder / "experts").iterdir():
        entry = entries.get(f"experts/{path.name}")
        half = path.name.startswith(".") and path.suffix in (".tmp", ".old")
        if (half or f"experts/{path.name}" in gone) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif entry is not None and not path.is_symlink():
            for name in HEADERS if "packed" in entry else PACKED_FILES:
                (path / name).unlink(missing_ok=True)
    packed = manifest.get("packed")
    kept = packed.get("file") if isinstance(packed, dict) else None
    if (folder / "packed").is_dir() and not (folder / "packed").is_symlink():
        for path in (folder / "packed").iterdir():
            if f"packed/{path.name}" != kept:
                path.unlink(missing_ok=True)
        if "packed" not in manifest:
            (folder / "packed").rmdir()
