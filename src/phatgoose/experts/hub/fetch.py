"""Fetch files of one commit from the Hub, within bounds and with hashes checked.

huggingface_hub compares the size of what it fetched but not the hash, except in Xet transfers, and it reads a body that
never ends, or breaks off again and again, forever. Both are checked here. Nothing is unpacked, imported or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from huggingface_hub import HfApi, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import tqdm

from phatgoose.errors import DownloadError, PhatgooseError
from phatgoose.experts.hub.place import Place
from phatgoose.files import sha256_file, storage_errors
from phatgoose.hub_errors import explain, hide_tokens, is_network, status

MAX_BYTES = 4 * 2**30
TEXT_BYTES = 64 * 2**20
"""The largest JSON or README.md that is fetched."""
TIMEOUT_SECONDS = 10.0
RETRY_SECONDS = (1.0, 3.0)
"""Waits before the Hub is asked again for a listing; after the last, the error is raised."""
SLACK_BYTES = 2**20
"""A transfer is ended when it has sent this much more than three times the file's size."""
THREADS = 8
LIBRARY = "phatgoose"


@contextlib.contextmanager
def hub_errors(
    doing: str, repo: str, token: str | bool | None, kind: type[PhatgooseError] = DownloadError
) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into one error that says what to do, and has no access token in it.

    Args:
        doing: what was tried, as in "fetch org/name".

    Raises:
        `kind`; StorageError: no space or permission to keep what is fetched.
    """
    try:
        with storage_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)):
            yield
    except PhatgooseError:
        raise
    except Exception as error:  # huggingface_hub's errors and its HTTP library's have no common type
        secrets = [s for s in (token, get_token()) if isinstance(s, str) and s]
        said = explain(error, repo, "repository") or f"{type(error).__name__}: {error}"
        text = hide_tokens(f"can't {doing}: {said}", secrets)
        # The Hub's own error stays attached, unless a token is in it, or in one that would be printed with it.
        leaks = any(hide_tokens(str(one), secrets) != " ".join(str(one).split()) for one in _printed(error))
        raise kind(text[:1000]) from (None if leaks else error)


def _printed(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that are printed with it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it."""

    size: int
    """In bytes."""
    digest: str | None
    """sha256 of files in LFS, git's sha1 of others."""


@dataclass(frozen=True)
class Listing:
    """The files of a commit, as the Hub lists them."""

    revision: str
    """The commit's sha."""
    files: Mapping[str, RemoteFile] = field(repr=False)
    private: bool = False

    def below(self, place: Place) -> set[str]:
        """Paths of the files in the place's folder, relative to it."""
        prefix = place.path("")
        return {name.removeprefix(prefix) for name in self.files if name.startswith(prefix)}


@dataclass(frozen=True)
class Fetched:
    """Files of one commit in huggingface_hub's cache."""

    revision: str
    """The commit's sha."""
    paths: Mapping[str, Path] = field(repr=False)
    """By their paths in the repository; optional files that the commit lacks are absent."""


def fetch(
    place: Place,
    listing: Listing,
    required: Sequence[str],
    optional: Sequence[str],
    token: str | bool | None,
    max_bytes: int = MAX_BYTES,
) -> Fetched:
    """Fetches files of the listed commit by their paths in the repository; refuses what isn't as the Hub lists it."""
    wanted = [*required, *(name for name in optional if name in listing.files)]
    for name in wanted:
        _check_size(place, name, listing, max_bytes)
    session = _Session(place.repo, listing, token)
    # The first is fetched by the revision's name, so that huggingface_hub notes its commit for use without a network.
    paths = [session.get(name, place.revision) for name in wanted[:1]]
    with ThreadPoolExecutor(THREADS) as threads:
        paths += threads.map(session.get, wanted[1:])
        list(threads.map(session.note_absence, [name for name in optional if name not in listing.files]))
    return Fetched(listing.revision, dict(zip(wanted, paths, strict=True)))


def list_files(repo: str, revision: str | None, token: str | bool | None) -> Listing:
    """Every file of a revision, with sizes and hashes, in one request, which is retried when it fails."""
    for wait in (*RETRY_SECONDS, None):
        try:
            info = HfApi(token=token, library_name=LIBRARY).model_info(
                repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
            break
        except Exception as error:
            if wait is None or not (is_network(error) or (status(error) or 0) >= 500):
                raise
            time.sleep(wait)
    if not info.sha:
        raise DownloadError(f"the Hub names no commit for {repo}; it may be empty.")
    files = {
        s.rfilename: RemoteFile(s.size or 0, s.lfs.sha256 if s.lfs else s.blob_id)
        for s in info.siblings or []
    }
    return Listing(info.sha, files, bool(info.private))


def from_cache(place: Place, required: Sequence[str], optional: Sequence[str]) -> Fetched:
    """The files from huggingface_hub's cache, without asking the Hub.

    Raises:
        LookupError: the cache lacks a required file, or doesn't know whether the commit has an optional one.
        DownloadError: a file is damaged.
    """
    found: dict[str, Path] = {}
    revision = place.commit or ""
    for name in (*required, *optional):
        path = try_to_load_from_cache(place.repo, name, revision=place.revision)
        if isinstance(path, str):
            found[name] = Path(path)
            revision = _commit_of(found[name], name)
            if len(blob := _blob_hash(found[name])) in (40, 64):
                _check_hash(place.repo, name, found[name], blob)
        elif path is None or name in required:
            raise LookupError(name)
    return Fetched(revision, found)


class _Session:
    """Downloads from one commit."""

    def __init__(self, repo: str, listing: Listing, token: str | bool | None) -> None:
        self.repo, self.listing, self.token = repo, listing, token

    def get(self, name: str, revision: str | None = "") -> Path:
        """Downloads a file and returns its path in the cache. `revision`, if given, must be the listed commit."""
        file = self.listing.files[name]
        path = Path(self._download(name, self.listing.revision if revision == "" else revision, file.size))
        if _commit_of(path, name) != self.listing.revision:
            raise DownloadError(f"{self.repo} was changed while it was being fetched: try again.")
        if file.digest is None:
            raise DownloadError(f"{self.repo}: the Hub lists no hash of {name}, so it can't be checked.")
        _check_hash(self.repo, name, path, file.digest)
        return path

    def note_absence(self, name: str) -> None:
        """Asks the Hub for a file that isn't there, so that the cache knows, and needs no network next time."""
        known = try_to_load_from_cache(self.repo, name, revision=self.listing.revision)
        if known is not None and not isinstance(known, str):
            return
        try:
            self._download(name, self.listing.revision, 0)
        except RemoteEntryNotFoundError:
            return
        raise DownloadError(f"{self.repo} has a file {name} that it doesn't list: try again.")

    def _download(self, name: str, revision: str | None, size: int) -> str:
        return hf_hub_download(
            self.repo,
            name,
            revision=revision,
            token=self.token,
            library_name=LIBRARY,
            etag_timeout=TIMEOUT_SECONDS,
            tqdm_class=_meter(f"{self.repo}: {name}", size, shown=len(self.listing.files) < 20),
        )


def _meter(what: str, size: int, shown: bool) -> type[tqdm]:
    """A progress bar that raises an error when a transfer sends much more than `size` bytes."""
    limit = 3 * size + SLACK_BYTES

    class Meter(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            self.received = 0
            options = ({} if shown else {"disable": True}) | settings
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]  # tqdm has no types

        def update(self, n: float | None = 1) -> bool | None:
            self.received += max(0, int(n or 0))
            if self.received > limit:
                raise DownloadError(
                    f"{what}: the Hub lists {size} bytes, and {self.received} came without an end: the transfer "
                    "breaks off again and again, or sends something else. Try again later."
                )
            refreshed: bool | None = super().update(n)
            return refreshed

    return Meter


def _check_size(place: Place, name: str, listing: Listing, max_bytes: int) -> None:
    if name not in listing.files:
        raise DownloadError(f"{place.repo} at {listing.revision} has no file {name}.")
    limit = max_bytes if name.endswith(".safetensors") else min(TEXT_BYTES, max_bytes)
    if (size := listing.files[name].size) > limit:
        raise DownloadError(
            f"{place.repo}: {name} is {size:,} bytes, and at most {limit:,} are fetched; it was not. If that is "
            "right, allow more with max_bytes (--max-gb on the command line)."
        )


def _check_hash(repo: str, name: str, path: Path, expected: str) -> None:
    """Refuses a file of the cache, and removes it, if it doesn't have this hash, or is named there after another."""
    kind, found = ("sha256", sha256_file(path)) if len(expected) == 64 else ("git's sha1", _git_sha1(path))
    blob = _blob_hash(path)
    if found == expected and len(blob) == len(expected):
        found = blob
    if found == expected:
        return
    named = path.parent / path.readlink() if path.is_symlink() else path
    for file in (path.resolve(), named, path):
        file.unlink(missing_ok=True)
    raise DownloadError(
        f"{repo}: {name} is not the file that the Hub lists: {kind} expected {expected}, found {found}. It was not "
        "kept: try again."
    )


def _blob_hash(path: Path) -> str:
    """The hash that the file's blob in huggingface_hub's cache is named after; "" where the cache has no links."""
    return path.readlink().name if path.is_symlink() else ""


def _git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _commit_of(path: Path, name: str) -> str:
    """The commit of a file in the cache, from its path …/snapshots/COMMIT/NAME."""
    return path.parents[name.count("/")].name
