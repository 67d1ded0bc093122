"""Write experts into a pool's folder, make their manifest entries, and write its card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.card.card import Facts, read_object, write_pool_card
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safe_folder import SafeFolder
from phatgoose.experts.manifest import expert_folder, origin_of, verify_files
from phatgoose.experts.names import CONFIG_FILE, EXPERT_FILES, GATES_FILE, RECORD_FILE
from phatgoose.files import sha256_file


def place_expert(folder: Path, expert: Expert, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes `expert` into the pool in `folder`, unless it is there already, and returns its manifest entry.

    Args:
        entries: of the experts that the pool has.
    """
    for entry in entries:
        if entry["name"] == expert.name and _has_expert(folder / entry["folder"], expert, entry):
            return _entry(expert, entry["folder"], entry["files"])
    taken = {entry["folder"] for entry in entries}
    relative, number = f"experts/{expert.name}", 1
    # A folder that no entry names was left by a process that was killed before it wrote the manifest: if it
    # holds this very expert, it is used.
    while relative in taken or (
        os.path.lexists(folder / relative) and not _has_expert(folder / relative, expert)
    ):
        number += 1
        relative = f"experts/{expert.name}.{number}"
    place = folder / relative
    if not place.exists():
        expert.save(place)
    names = [name for name in EXPERT_FILES if (place / name).exists()]
    return _entry(expert, relative, {name: sha256_file(place / name) for name in names})


def write_description(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the pool's README.md, from the manifest and the experts' small files; what can't be read is left out."""
    facts = [
        Facts(
            entry["name"],
            _object(folder, entry, CONFIG_FILE),
            _object(folder, entry, RECORD_FILE).get("provenance"),
            GATES_FILE in entry["files"],
            origin=str(origin_of(entry) or ""),
        )
        for entry in manifest["experts"]
    ]
    base = manifest.get("base")
    spec = base.get("spec") if isinstance(base, dict) else None
    folders = [entry["folder"] for entry in manifest["experts"]]
    write_pool_card(folder, list(zip(facts, folders, strict=True)), spec if isinstance(spec, str) else None)


def _entry(expert: Expert, relative: str, files: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": expert.name, "folder": relative, "files": files}
    return entry if expert.origin is None else {**entry, "source": expert.origin.to_json()}


def _has_expert(place: Path, expert: Expert, entry: dict[str, Any] | None = None) -> bool:
    """Whether `place` is a folder, not a link, with this very expert, and with the files of `entry`."""
    try:
        if entry is not None:
            verify_files(SafeFolder(place, PoolError, links_checked=True), entry)
        return not place.is_symlink() and Expert.load(place, name=expert.name).equals(expert)
    except PhatgooseError:
        return False


def _object(folder: Path, entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    try:
        return read_object(expert_folder(folder, entry).path / name)
    except PoolError:  # a link out of the pool
        return {}
