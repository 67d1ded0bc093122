"""Publish an expert's or a pool's folder on the Hub: exactly its own files, in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

from phatgoose.errors import PoolError, UploadError
from phatgoose.experts.card.card import CARD_LIMIT_BYTES, is_made
from phatgoose.experts.hub.fetch import LIBRARY, Listing, fetch, hub_errors, list_files
from phatgoose.experts.hub.place import Place
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.names import CARD_FILE, CONFIG_FILE, EXPERT_FILES, INTERFACE_FILE, MANIFEST
from phatgoose.files import read_json
from phatgoose.records import HubSource

_PUBLISHED = (*EXPERT_FILES, INTERFACE_FILE, CARD_FILE)
_OURS = re.compile(rf"(?:experts/[^/]+/)?(?:{'|'.join(map(re.escape, (*_PUBLISHED, MANIFEST)))})")
# An absolute path, perhaps after a task's source: "/home/…", "~/…", "C:\…", "jsonl:/home/…"; not "https://…".
_PATH = re.compile(r"(?:\w+:)?(?:/(?!/)|~\w*[\\/]|\\\\).+|[A-Za-z]:[\\/](?!/).+|file:.+", re.DOTALL)


@dataclass(frozen=True)
class PushOptions:
    """How to publish on the Hub; `Pool.push` says what each means."""

    private: bool | None = None
    revision: str | None = None
    token: str | bool | None = None
    message: str | None = None
    allow_paths: bool = False


def push_expert(folder: Path, repo: str, subfolder: str, options: PushOptions) -> HubSource:
    """Publishes an expert's folder: see `Expert.push`."""
    place = _target(repo, options.revision, subfolder)
    files = {name: folder / name for name in _PUBLISHED if (folder / name).is_file()}
    return _push(place, files, options, refused=MANIFEST, what="a pool: push the expert")


def push_pool(folder: Path, repo: str, options: PushOptions) -> HubSource:
    """Publishes the folder of a pool that isn't packed: see `Pool.push`."""
    place = _target(repo, options.revision, "")
    entries = read_manifest(folder)["experts"]
    if not entries:
        raise PoolError(f"{folder} is an empty pool; add an expert with `phatgoose pool add`.")
    names = [MANIFEST, CARD_FILE]
    for entry in entries:
        names += [f"{entry['folder']}/{name}" for name in (*entry["files"], CARD_FILE)]
    files = {name: folder / name for name in names if (folder / name).is_file() or name != CARD_FILE}
    message = options.message or f"Pool of {len(entries)} experts"
    options = replace(options, message=message)
    return _push(place, files, options, refused=CONFIG_FILE, what="an expert: push the pool")


def _push(
    place: Place, files: Mapping[str, Path], options: PushOptions, refused: str, what: str
) -> HubSource:
    """Makes `files`, by their paths in the place's folder, what the Hub has there; files that aren't ours stay.

    Args:
        refused: a file that only repositories of another kind have.
        what: such a repository, as the error message names it.
    """
    if not options.allow_paths:
        _refuse_paths(files)
    token = options.token
    api = HfApi(token=token, library_name=LIBRARY)
    with hub_errors(f"publish {place}", place.repo, token, UploadError):
        api.create_repo(place.repo, private=options.private, exist_ok=True)
        if place.revision is not None:
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        listing = list_files(place.repo, place.revision, token)
        there = listing.below(place)
        if options.private and not listing.private:
            raise UploadError(
                f"{place.repo} is there already, and it is public: nothing was published. Choose another, or make "
                "it private on the Hub."
            )
        if refused in there:
            raise UploadError(f"{place} is {what} to a repository of its own.")
        # A card that somebody wrote on the Hub stays; our own files that the folder no longer has are deleted.
        add = [n for n in files if n != CARD_FILE or not _is_theirs(place, listing, files[n], token)]
        gone = sorted(n for n in there - files.keys() if _OURS.fullmatch(n) and n != CARD_FILE)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=place.path(n), path_or_fileobj=files[n]) for n in add),
            *(CommitOperationDelete(path_in_repo=place.path(n), is_folder=False) for n in gone),
        ]
        done = api.create_commit(
            place.repo,
            operations,
            commit_message=str(options.message),
            revision=place.revision,
            parent_commit=listing.revision,  # so that somebody else's push in between is not undone
        )
    return HubSource(place.repo, done.oid, place.subfolder)


def _target(repo: str, revision: str | None, subfolder: str) -> Place:
    place = Place.parse(repo, revision, subfolder)
    if place.commit:
        raise UploadError(f"{place.revision} is a commit; a push needs a branch.")
    return place


def _is_theirs(place: Place, listing: Listing, card: Path, token: str | bool | None) -> bool:
    """Whether the repository has a card that somebody wrote, and `card` is only one that we generated."""
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
                        f"{name} holds a local path, which everybody could read: {key} is {value!r}. Nothing was "
                        "published. Allow it (allow_paths=True, --allow-paths), or train on a base that is named "
                        "by a Hub id."
                    )


def _strings(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, with its key ("task.source.spec")."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for value in data:
            yield from _strings(value, key)
