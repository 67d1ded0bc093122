"""A pool's manifest (pool.json): read and check it; verify, lock and sweep its folder."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertError, PoolError, brief
from phatgoose.experts.files.safe_folder import SafeFolder
from phatgoose.experts.files.safetensors_file import check_sha256
from phatgoose.experts.names import EXPERT_FILES, HEADERS, MANIFEST, PACKED_FILES, check_name
from phatgoose.files import JSON_LIMIT_BYTES, is_folder, storage_errors
from phatgoose.locks import locked
from phatgoose.memory import available_bytes
from phatgoose.records import Fingerprint, HubSource
from phatgoose.shipped import pools

LOCK_SECONDS = 600.0
"""How long to wait for a pool's lock."""
FORMAT_VERSION, PACKED_VERSION = 1, 2
_FOLDER = re.compile(r"experts/[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder without a manifest holds only what a save that was killed leaves. Experts among it are kept."""
    return folder.is_dir() and all(
        p.name in ("experts", ".lock") or p.name.startswith(f".{MANIFEST}.") for p in folder.iterdir()
    )


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """Makes a pool's folder if there is none, holds its lock, and gives its manifest, or a new one."""
    if folder.exists() and not (folder / MANIFEST).exists() and not _is_unfinished(folder):
        raise PoolError(f"{folder} exists and holds something else than a pool; choose another folder.")
    with storage_errors(folder):
        (folder / "experts").mkdir(parents=True, exist_ok=True)
    with lock(folder):
        yield read_manifest(folder) if (folder / MANIFEST).exists() else new_manifest([], None)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the pool's lock while it is written; refuses a link, and one that is held for ten minutes."""
    _check_folder(folder)  # a lock would make it
    held = f"{folder} has been held by another process for {LOCK_SECONDS:g} seconds: wait until it is done, or end it."
    with locked(folder / ".lock", f"the pool in {folder}", LOCK_SECONDS, PoolError(held), needed=True):
        yield


def read_manifest(folder: Path) -> dict[str, Any]:
    """A pool's manifest; its list of experts is well formed and names nothing outside the pool."""
    files, path = SafeFolder(folder, PoolError), folder / MANIFEST
    _check_folder(folder)
    manifest = files.read_json(MANIFEST, JSON_LIMIT_BYTES)
    if not isinstance(manifest, dict) or manifest.get("format") != "phatgoose-pool":
        raise PoolError(f'{path} is not a pool\'s manifest (no "format": "phatgoose-pool").')
    expected = PACKED_VERSION if "packed" in manifest else FORMAT_VERSION
    if manifest.get("version") != expected:
        raise PoolError(
            f"{path} has format version {brief(manifest.get('version'))}; this phatgoose reads {FORMAT_VERSION} "
            f"and, of packed pools, {PACKED_VERSION}. Update phatgoose."
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


def new_manifest(entries: list[dict[str, Any]], base: dict[str, Any] | None) -> dict[str, Any]:
    """A pool's manifest. base: as `base_of` reads it."""
    return {"format": "phatgoose-pool", "version": FORMAT_VERSION, "base": base, "experts": entries}


def base_of(manifest: Mapping[str, Any], folder: Path) -> Fingerprint | str | None:
    """The base that a manifest records: a fingerprint, only a name ({"spec": …}), or None.

    Raises:
        PoolError: it is something else.
    """
    found = manifest.get("base")
    if found is None:
        return None
    try:
        if found.keys() == {"spec"} and isinstance(found["spec"], str) and found["spec"]:
            return str(found["spec"])
        return Fingerprint.from_json(found)
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise PoolError(
            f"{folder / MANIFEST}: the recorded base is neither a fingerprint nor a name: {brief(cause)}. Make "
            f"it null there, then say which base it is: `phatgoose pool base {folder} BASE`."
        ) from cause


def origin_of(entry: Mapping[str, Any]) -> HubSource | None:
    """Where on the Hub the expert of a manifest's entry was fetched from."""
    return HubSource.from_json(entry["source"]) if entry.get("source") is not None else None


def expert_folder(folder: Path, entry: Mapping[str, Any]) -> SafeFolder:
    """An expert's folder from its manifest entry; neither it nor a file in it is a link out of the pool."""
    place, root = folder / entry["folder"], folder.resolve()
    try:
        for path in (place, *(place / name for name in (*EXPERT_FILES, *PACKED_FILES))):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise PoolError(f"{path} is a link that leads out of the pool's folder; it is not followed.")
    except (OSError, RuntimeError) as cause:  # RuntimeError: links in a circle
        raise PoolError(f"{place} can't be read: {cause}") from cause
    return SafeFolder(place, PoolError, links_checked=True)


def verify_files(folder: SafeFolder, entry: dict[str, Any]) -> None:
    """Refuses files of an expert that aren't those in the manifest, or are larger than this machine's free memory."""
    for name, expected in entry["files"].items():
        path = folder.path / name
        if name not in EXPERT_FILES:
            raise PoolError(f"{folder.path}: the manifest lists a file {name!r}, which no expert has.")
        if not folder.has(name):
            raise PoolError(f"{path} is missing, although the pool's manifest lists it.")
        check_sha256(expected, folder.sha256(name, available_bytes()), path, error=PoolError)
    for name in EXPERT_FILES:
        if name not in entry["files"] and folder.has(name):
            raise PoolError(
                f"{folder.path / name} is not listed in the pool's manifest; was it added by hand? Use `phatgoose "
                "pool add`."
            )


def sweep(folder: Path, manifest: Mapping[str, Any], before: Iterable[Mapping[str, Any]] = ()) -> None:
    """Deletes what the pool no longer needs once this manifest is written; what was never its own stays.

    That is: experts of the entries `before` that aren't in the manifest; files of packed experts that are unpacked
    now, and the reverse; old files of stacks; and what a killed process has half written.
    """
    entries = {e["folder"]: e for e in manifest["experts"]}
    gone = {e["folder"] for e in before} - entries.keys()
    for path in (folder / "experts").iterdir():
        entry = entries.get(f"experts/{path.name}")
        half = path.name.startswith(".") and path.suffix in (".tmp", ".old")  # as `atomic_folder` names them
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


def _check_entry(entry: Any, where: str) -> None:
    types = (("name", str), ("folder", str), ("files", dict))
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in types):
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


def _check_folder(folder: Path) -> None:
    """Refuses what is no folder, and a pool whose own parts are links: a sweep would delete what they lead to."""
    if not is_folder(folder, PoolError):
        if str(folder) in pools():
            raise PoolError(
                f"the pool {folder} comes with phatgoose and isn't changed: make a copy of your own with `phatgoose "
                f"pool pull {folder} FOLDER`."
            )
        raise PoolError(
            f"{folder} is not a folder; expected a pool made by `phatgoose pool create`, or one that comes with "
            f"phatgoose: {', '.join(pools())}."
        )
    for name in ("experts", "packed", ".lock"):
        try:
            linked = (folder / name).is_symlink()
        except OSError as cause:
            raise PoolError(f"{folder} can't be read: {cause.strerror}.") from cause
        if linked:
            raise PoolError(
                f"{folder / name} is a link, which is not followed: it could lead out of the pool's folder. Put "
                "the folder itself there."
            )
