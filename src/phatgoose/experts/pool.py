"""A pool: experts of one base, in memory and as a folder with a manifest."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts import health
from phatgoose.experts.card.card import Facts, write_pool_card
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safe_folder import SafeFolder
from phatgoose.experts.manifest import (
    base_of,
    expert_folder,
    new_manifest,
    opened,
    origin_of,
    read_manifest,
    sweep,
    verify_files,
)
from phatgoose.experts.names import CONFIG_FILE, EXPERT_FILES, GATES_FILE, MANIFEST, RECORD_FILE
from phatgoose.experts.packed.expert import PackedExpert, PackedRows, gate_stack, rows_in_place
from phatgoose.experts.packed.open import PackedPoolReader
from phatgoose.files import (
    JSON_LIMIT_BYTES,
    atomic_folder,
    sha256_file,
    storage_errors,
    work_place,
    write_json,
)
from phatgoose.fingerprints import check_same_base
from phatgoose.ops.update import sizes_agree
from phatgoose.records import Fingerprint, HubSource
from phatgoose.registry import unknown
from phatgoose.shipped import pool_folder, pools

MOST_FAILURES = 50
"""After so many damaged experts, `load` looks at no others."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Experts of one base model, in order; names are unique. Immutable: adding or removing gives a new pool.

    Raises:
        PoolError: no experts, a name twice, or modules whose shapes disagree between experts.
        BaseModelError: two experts record different bases, or one another than the pool.
    """

    experts: tuple[Expert, ...]
    own_base: Fingerprint | str | None = None
    """The base that the pool itself records, beside its experts: its fingerprint, or only its name."""

    def __init__(self, experts: Sequence[Expert], own_base: Fingerprint | str | None = None):
        object.__setattr__(self, "experts", tuple(experts))
        object.__setattr__(self, "own_base", own_base)
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
        for name, base in known if isinstance(own_base, Fingerprint) else known[1:]:
            if isinstance(own_base, Fingerprint):
                check_same_base(own_base, base, f"the pool and expert {name!r}")
            else:
                check_same_base(known[0][1], base, f"experts {known[0][0]!r} and {name!r}")

    def _check_shapes(self) -> None:
        owners: dict[str, Expert] = {}
        sizes: dict[str, tuple[int, int]] = {}
        seen: set[int] = set()
        for expert in self.experts:
            if id(expert.sizes) in seen:  # packed experts with one layout share their sizes
                continue
            seen.add(id(expert.sizes))
            # A size of 0, which only the base knows, agrees with any other.
            for path, (*found, embedding) in expert.sizes.items():
                first, known = owners.setdefault(path, expert), sizes.setdefault(path, (0, 0))
                if not all(map(sizes_agree, known, found)) or embedding != first.sizes[path][2]:
                    raise PoolError(
                        f"experts {first.name!r} and {expert.name!r} disagree about {path}: {known[0]} → "
                        f"{known[1]} and {found[0]} → {found[1]}. They can't be of one base."
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
        """The base that the pool or its experts record; None if none of them does."""
        if isinstance(self.own_base, Fingerprint):
            return self.own_base
        return next((e.base for e in self.experts if e.base is not None), None)

    @cached_property
    def base_spec(self) -> str | None:
        """What the base is called: by the pool, else by the experts that were trained here, else by all configs that
        name one alike. None if nobody says it, or configs disagree."""
        if isinstance(self.own_base, str):
            return self.own_base
        if self.base is not None:
            return self.base.spec
        names = {e.base_name for e in self.experts if e.base_name is not None}
        return names.pop() if len(names) == 1 else None

    @property
    def base_record(self) -> dict[str, Any] | None:
        """The base as the manifest records it."""
        if self.base is not None:
            return self.base.to_json()
        return {"spec": self.own_base} if isinstance(self.own_base, str) else None

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of all modules that any expert adapts, in the order the experts list them."""
        return tuple(dict.fromkeys(path for e in self.experts for path in e.updates))

    def add(self, expert: Expert) -> Pool:
        return self.of((*self.experts, expert))

    def remove(self, name: str) -> Pool:
        self[name]
        return self.of([e for e in self.experts if e.name != name])

    def of(self, experts: Sequence[Expert]) -> Pool:
        """A pool of other experts of the same base."""
        return Pool(experts, self.own_base)

    def rows(self, path: str, dtype: torch.dtype) -> tuple[PackedRows | None, str]:
        """All low-rank rows at a module as views of a packed pool's file, or None and why they must be copied."""
        return rows_in_place([e for e in self.experts if path in e.sizes], path, dtype)

    def release_gates(self) -> None:
        """Frees the memory of packed gates that were read; they are read again when they are used again."""
        sources = [e.source for e in self.experts if isinstance(e, PackedExpert)]
        for file in {id(s.file): s.file for s in sources}.values():
            stacks = {gate_stack(path) for s in sources if s.file is file for path in s.gate_index}
            file.release(stacks)

    def let_go_of_gates(self) -> None:
        """Deprecated: use `release_gates`."""
        warnings.warn("Pool.let_go_of_gates is now Pool.release_gates.", DeprecationWarning, stacklevel=2)
        self.release_gates()

    def save(self, folder: str | Path, *, replace: bool = True) -> Path:
        """Writes the pool; an existing pool folder becomes this one. Experts of a packed pool are written unpacked.

        A process that is killed leaves either the old pool or the new one: experts are written before the manifest
        that names them, and those that the pool no longer has are deleted after it. Experts that are there already
        are not written again.

        Args:
            replace: False to refuse a folder that has a pool by the time it is written.

        Raises:
            PoolError: `folder` holds something else, or a packed pool. StorageError: no space or no permission.
        """
        folder = Path(folder)
        with opened(folder) as manifest:
            if not replace and (folder / MANIFEST).exists():
                raise PoolError(
                    f"{folder} is a pool already: use `phatgoose pool add`, or choose another folder."
                )
            if "packed" in manifest:
                raise PoolError(
                    f"{folder} is packed and can't be written as a whole: change it by `phatgoose pool add` and "
                    "`pool remove` (add_to_folder, remove_from_folder), unpack it first, or choose another folder."
                )
            entries = [place_expert(folder, expert, manifest["experts"]) for expert in self.experts]
            write_pool(folder, new_manifest(entries, self.base_record), before=manifest["experts"])
        return folder

    @staticmethod
    def load(folder: str | Path, *, verify: bool = True) -> Pool:
        """Reads a pool folder. A packed pool is mapped into memory: its values are read when they are used.

        Args:
            folder: or the name of a pool that comes with phatgoose, where there is no such folder.
            verify: compare every file with the sha256 in the manifest. Shapes, finiteness and bases are always
                checked. Of a packed pool the mapped file is not read; `pool_folder.verify_folder` reads all.

        Raises:
            PoolError, ExpertError: naming the file, what was expected and what was found.
        """
        folder = pool_folder(folder)
        experts: list[Expert] = []
        failures = []
        manifest = read_manifest(folder)
        packed = PackedPoolReader(folder, manifest, verify=verify) if "packed" in manifest else None
        for entry in manifest["experts"]:
            try:
                files = expert_folder(folder, entry)
                if packed is not None and "packed" in entry:
                    experts.append(replace(packed.expert(files, entry), origin=origin_of(entry)))
                    continue
                if verify:
                    verify_files(files, entry)
                experts.append(Expert.load(files.path, name=entry["name"], origin=origin_of(entry)))
            except PhatgooseError as error:
                failures.append(error)
                if len(failures) == MOST_FAILURES:
                    break
        more = " or more" if len(failures) == MOST_FAILURES else ""
        raise_all(failures, f"{len(failures)}{more} experts of {folder} can't be loaded:")
        if not experts:
            raise PoolError(f"{folder} is an empty pool; add an expert with `phatgoose pool add`.")
        return Pool(experts, base_of(manifest, folder))

    @staticmethod
    def pull(
        repo: str,
        folder: str | Path | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        overwrite: bool = False,
        max_bytes: int | None = None,
    ) -> Pool:
        """Fetches a pool from the Hub; a commit that was fetched before needs no network, nor does HF_HUB_OFFLINE=1.

        Args:
            repo: "org/name", or "org/name@revision:subfolder" in place of the arguments `revision` and `subfolder`; or
                the name of a pool that comes with phatgoose, which needs no network.
            folder: where to put a copy, to change it or to keep it; if None, the pool is read from the cache.
            revision: a branch, tag or commit; the main branch if None.
            token: an access token; if None, the one of `hf auth login` or HF_TOKEN.
            overwrite: replace another pool in `folder`.
            max_bytes: refuse larger files, by the size that the Hub lists; 4 GiB if None.

        Raises:
            DownloadError: it can't be fetched, is too large, or isn't what the Hub lists.
            PoolError, ExpertError: as `load` does, or `folder` holds something else.
        """
        from phatgoose.experts.hub.place import Place
        from phatgoose.experts.hub.pull import check_free, pull_pool  # here, since it takes long

        if folder is not None:
            check_free(Path(folder), overwrite)
        if (shipped := pools().get(repo)) is not None:
            if revision is not None or subfolder is not None:
                raise PoolError(
                    f"{repo} comes with phatgoose and has no revisions or subfolders: leave them out, or give a Hub id "
                    "(org/name)."
                )
            pool = Pool.load(shipped)
            if folder is not None:
                with atomic_folder(Path(folder)) as work:
                    shutil.copytree(shipped, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
            return pool
        pulled = pull_pool(Place.parse(repo, revision, subfolder), token, max_bytes)
        pool = Pool.load(pulled.folder)
        if folder is not None:
            pulled.copy(Path(folder))
        return pool

    def push(
        self,
        repo: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        message: str | None = None,
        allow_paths: bool = False,
    ) -> HubSource:
        """Publishes the pool as a repository on the Hub, in one commit; one that is there already becomes this pool.

        Args:
            private: whether a new repository is private; if None, as the account's settings say, usually public.
            revision: the branch, made if it isn't there; the main branch if None.
            message: of the commit.
            allow_paths: publish records that hold paths of local folders.

        Returns: the repository and the new commit.

        Raises:
            UploadError: it can't be published, its records hold local paths, or the repository holds something else.
        """
        from phatgoose.experts.hub.push import PushOptions, push_pool

        with work_place(None) as work, storage_errors(work):
            options = PushOptions(private, revision, token, message, allow_paths)
            return push_pool(self.save(work / "pool"), repo, options)

    def warnings(self, weight_norms: Mapping[str, float] | None = None, tokenizer: Any = None) -> list[str]:
        """What a user should know about this pool although it is valid; docs/experts-and-pools.md has the list.

        Args:
            weight_norms: Frobenius norms of the base's weights by module path, to find updates that are larger than
                the weights they change.
            tokenizer: the base's, to compare tokenizer files of the experts with.
        """
        return list(map(str, self.warned(weight_norms, tokenizer)))

    def warned(
        self, weight_norms: Mapping[str, float] | None = None, tokenizer: Any = None
    ) -> list[health.Warned]:
        """`warnings`, each with the expert and the kind that it is of."""
        found = health.warnings(self.experts, weight_norms, tokenizer)
        recorded = isinstance(self.own_base, Fingerprint)
        return [one for one in found if not (recorded and one.text == health.NO_BASE)]


def raise_all(failures: Sequence[PhatgooseError], title: str) -> None:
    """Raises a single failure as it is, and several as one PoolError under a title; nothing without failures."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise PoolError("\n".join([title, *map(str, failures)]))


def place_expert(folder: Path, expert: Expert, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes `expert` into a pool that has these entries, unless it is there already, and returns its entry."""
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


def write_pool(folder: Path, manifest: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes a manifest, from which on the folder is this pool; deletes what it no longer needs; writes its card.

    Args:
        before: entries of the experts that the pool had.
    """
    write_json(folder / MANIFEST, manifest)
    sweep(folder, manifest, before)
    write_description(folder, manifest)


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


def _object(folder: Path, entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    try:
        return expert_folder(folder, entry).read_object(name, JSON_LIMIT_BYTES)
    except PoolError:  # a card must not stop what it describes
        return {}
