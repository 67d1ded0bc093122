"""Pools on disk: add, remove, verify and publish without writing the whole pool again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import base_of, lock, opened, read_manifest
from phatgoose.experts.names import MANIFEST
from phatgoose.experts.packed.expert import PackedExpert
from phatgoose.experts.packed.pack import append, check_packed
from phatgoose.experts.pool import Pool, place_expert, raise_all, write_description, write_pool
from phatgoose.files import write_json
from phatgoose.records import Fingerprint, HubSource
from phatgoose.registry import unknown
from phatgoose.shipped import pool_folder

if TYPE_CHECKING:
    from phatgoose.experts.hub.push import PushOptions


def add_to_folder(folder: str | Path, expert: Expert) -> None:
    """Adds one expert to a pool on disk, a new one if there is none; the other experts aren't written.

    A packed pool stays packed, and is packed again with more room when it is full.

    Raises:
        PoolError: its name is taken, or its modules disagree. BaseModelError: it is of another base.
    """
    folder = Path(folder)
    with opened(folder) as manifest:
        entries = manifest["experts"]
        there = Pool.load(folder, verify=False) if entries else None
        pool = there.add(expert) if there else Pool([expert], base_of(manifest, folder))
        entry = place_expert(folder, expert, entries)
        manifest["base"] = pool.base_record
        if "packed" in manifest:
            append(folder, manifest, entry)
        else:
            write_json(folder / MANIFEST, {**manifest, "experts": [*entries, entry]})
        write_description(folder, read_manifest(folder))


def replace_in_folder(folder: str | Path, expert: Expert) -> None:
    """Puts an expert in the place of the one of its name in a pool on disk. A killed process leaves one of the two.

    Raises:
        PoolError: the pool is packed, or the expert doesn't go with the others. UnknownName: there is none of this
            name. BaseModelError: it is of another base.
    """
    folder = Path(folder)
    with lock(folder):
        manifest = read_manifest(folder)
        refuse_packed(folder, manifest)
        entries = manifest["experts"]
        if expert.name not in (names := [e["name"] for e in entries]):
            raise unknown("expert", expert.name, names)
        there = Pool.load(folder, verify=False)
        pool = there.of([expert if e.name == expert.name else e for e in there.experts])
        entry = place_expert(folder, expert, entries)
        changed = [entry if e["name"] == expert.name else e for e in entries]
        write_pool(folder, {**manifest, "base": pool.base_record, "experts": changed}, before=entries)


def refuse_packed(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises PoolError if a pool is packed, whose experts can't be changed one by one."""
    if "packed" in manifest:
        raise PoolError(
            f"{folder} is packed, and its experts can't be changed: unpack it first, with `phatgoose pool unpack "
            f"{folder}`."
        )


def record_base(folder: str | Path, base: Fingerprint | str) -> None:
    """Records the base of a pool on disk: its fingerprint, or only its name. The experts aren't written.

    Raises:
        PoolError: it is no pool. BaseModelError: an expert records another base.
    """
    folder = Path(folder)
    with lock(folder):
        manifest = read_manifest(folder)
        if manifest["experts"]:
            pool = Pool.load(folder, verify=False)
            record = Pool(pool.experts, base).base_record
        else:
            record = {"spec": base} if isinstance(base, str) else base.to_json()
        write_json(folder / MANIFEST, {**manifest, "base": record})
        write_description(folder, read_manifest(folder))


def remove_from_folder(folder: str | Path, name: str) -> None:
    """Removes one expert from a pool on disk; the others need not be readable."""
    folder = Path(folder)
    with lock(folder):
        manifest = read_manifest(folder)
        entries = manifest["experts"]
        if name not in (names := [e["name"] for e in entries]):
            raise unknown("expert", name, names)
        kept = [e for e in entries if e["name"] != name]
        write_pool(folder, {**manifest, "experts": kept}, before=entries)


def verify_folder(folder: str | Path) -> Pool:
    """Loads a pool and reads every byte of it. Of a packed pool, that is more than `Pool.load` reads.

    Raises:
        PoolError, ExpertError: naming everything that is damaged.
    """
    folder = Path(folder)
    pool = Pool.load(folder)
    failures: list[PhatgooseError] = []
    for expert in pool.experts:
        if isinstance(expert, PackedExpert):
            try:
                check_packed(expert)
            except PhatgooseError as error:
                failures.append(error)
    raise_all(failures, f"{len(failures)} experts of {folder} are damaged:")
    return pool


def push_folder(folder: str | Path, repo: str, options: PushOptions | None = None) -> HubSource:
    """Publishes a pool on disk, byte for byte; a packed one is unpacked first. It should have been verified.

    Raises:
        UploadError: as `Pool.push` does. PoolError: it is no pool, or an empty one.
    """
    from phatgoose.experts.hub.push import PushOptions, push_pool  # here, since it takes long

    folder, options = pool_folder(folder), options or PushOptions()
    if "packed" in read_manifest(folder):  # published as one folder an expert, which plain PEFT loads too
        return Pool.load(folder).push(repo, **vars(options))
    return push_pool(folder, repo, options)
