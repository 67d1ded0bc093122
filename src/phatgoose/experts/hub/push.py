"""Publishing experts and pools on the Hub: exactly their own files, in one commit, so that nobody ever sees half of one."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

from phatgoose.errors import PoolError, UploadError
from phatgoose.experts.adapters.adapterhub_layers import INTERFACE_FILE
from phatgoose.experts.adapters.formats import WEIGHTS_FILES
from phatgoose.experts.adapters.peft import CONFIG_FILE
from phatgoose.experts.card.card import CARD_FILE, CARD_LIMIT_BYTES, is_made
from phatgoose.experts.expert import Expert
from phatgoose.experts.hub.errors import refused
from phatgoose.experts.hub.fetch import LIBRARY, Listing, fetch, list_files
from phatgoose.experts.hub.place import Place
from phatgoose.experts.hub.pull import OPTIONAL
from phatgoose.experts.manifest import MANIFEST, read_manifest
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json, storage_errors
from phatgoose.records import HubSource

_EXPERT_FILES = (CONFIG_FILE, *WEIGHTS_FILES, INTERFACE_FILE, *OPTIONAL)
_OURS = re.compile(rf"(?:experts/[^/]+/)?(?:{'|'.join(map(re.escape, (*_EXPERT_FILES, MANIFEST)))})")
# An absolute path, perhaps behind a task's source: "/home/…", "~/…", "C:\…", "jsonl:/home/…"; not "https://…".
_PATH = re.compile(r"(?:\w+:)?(?:/(?!/)|~\w*[\\/]|\\\\).+|[A-Za-z]:[\\/](?!/).+|file:.+", re.DOTALL)


def push_expert(
    expert: Expert,
    repo: str,
    private: bool | None,
    revision: str | None,
    subfolder: str,
    token: str | bool | None,
    message: str | None,
    allow_paths: bool,
) -> HubSource:
    """`Expert.push`."""
    place = _target(repo, revision, subfolder)
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as work, storage_errors(Path(work)):
        folder = expert.save(Path(work) / expert.name)
        files = {name: folder / name for name in _EXPERT_FILES if (folder / name).is_file()}

        def check(names: set[str]) -> None:
            if MANIFEST in names:
                raise UploadError(f"{place} is a pool: push the expert to a repository of its own.")

        text = message or f"Expert {expert.name}"
        return _push(place, files, private, token, text, allow_paths, check)


def push_pool(
    pool: Pool,
    repo: str,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    message: str | None,
    allow_paths: bool,
) -> HubSource:
    """`Pool.push`."""
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as work, storage_errors(Path(work)):
        folder = pool.save(Path(work) / "pool")
        return push_folder(folder, repo, private, revision, token, message, allow_paths)


def push_folder(
    folder: Path,
    repo: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    allow_paths: bool = False,
) -> HubSource:
    """A pool's folder, byte for byte, a packed one unpacked; it should have been verified."""
    place = _target(repo, revision, "")
    manifest = read_manifest(folder)
    if "packed" in manifest:  # published as folders, which plain PEFT loads too
        return push_pool(Pool.load(folder), repo, private, revision, token, message, allow_paths)
    entries = manifest["experts"]
    if not entries:
        raise PoolError(f"{folder} is an empty pool; add an expert with `phatgoose pool add`.")
    names = [MANIFEST, CARD_FILE]
    for entry in entries:
        names += [f"{entry['folder']}/{name}" for name in (*entry["files"], CARD_FILE)]
    files = {name: folder / name for name in names if (folder / name).is_file() or name != CARD_FILE}

    def check(there: set[str]) -> None:
        if CONFIG_FILE in there:
            raise UploadError(f"{place} is an expert: push the pool to a repository of its own.")

    return _push(
        place, files, private, token, message or f"Pool of {len(entries)} experts", allow_paths, check
    )


def _push(
    place: Place,
    files: Mapping[str, Path],
    private: bool | None,
    token: str | bool | None,
    message: str,
    allow_paths: bool,
    check: Callable[[set[str]], None],
) -> HubSource:
    """`files` (by their paths in the place's folder) become what is there; files that aren't ours stay."""
    if not allow_paths:
        _refuse_paths(files)
    api = HfApi(token=token, library_name=LIBRARY)
    with refused(f"publish {place}", place.repo, token, UploadError):
        api.create_repo(place.repo, private=private, exist_ok=True)
        if place.revision is not None:
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        listing = list_files(place.repo, place.revision, token)
        prefix = place.path("")
        there = {name.removeprefix(prefix) for name in listing.files if name.startswith(prefix)}
        if private and not listing.private:
            raise UploadError(
                f"{place.repo} is there already, and it is public: nothing was published. Choose another, or make it private on the Hub."
            )
        check(there)
        add = [n for n in files if n != CARD_FILE or not _is_theirs(place, listing, files[n], token)]
        gone = sorted(n for n in there - files.keys() if _OURS.fullmatch(n) and n != CARD_FILE)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=place.path(n), path_or_fileobj=files[n]) for n in add),
            *(CommitOperationDelete(path_in_repo=place.path(n), is_folder=False) for n in gone),
        ]
        done = api.create_commit(
            place.repo,
            operations,
            commit_message=message,
            revision=place.revision,
            parent_commit=listing.revision,  # somebody else's push in between is not undone
        )
    return HubSource(place.repo, done.oid, place.subfolder)


def _target(repo: str, revision: str | None, subfolder: str) -> Place:
    place = Place.parse(repo, revision, subfolder)
    if place.commit:
        raise UploadError(f"{place.revision} is a commit; a push needs a branch.")
    return place


def _is_theirs(place: Place, listing: Listing, card: Path, token: str | bool | None) -> bool:
    """Whether the repository has a card that somebody wrote there, and we only have one that we made."""
    name = place.path(CARD_FILE)
    if name not in listing.files or not is_made(card.read_bytes()):
        return False
    if listing.files[name].size > CARD_LIMIT_BYTES:
        return True
    pinned = Place(place.repo, listing.revision, place.subfolder)
    there = fetch(pinned, listing, [name], [], token).paths[name]
    return not is_made(there.read_bytes())


def _refuse_paths(files: Mapping[str, Path]) -> None:
    """Refuses records with paths of local folders, which everybody could read."""
    for name, path in files.items():
        if name.endswith(".json"):
            for key, value in _strings(read_json(path, UploadError)):
                if _PATH.fullmatch(value):
                    raise UploadError(
                        f"{name} holds a local path, which everybody could read: {key} is {value!r}. Nothing was published. "
                        "Allow it (allow_paths=True, --allow-paths), or train on a base that is named by a Hub id."
                    )


def _strings(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, with where it stands."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for value in data:
            yield from _strings(value, key)
