"""Fetch an expert's or a pool's files from the Hub, from one commit, into a plain folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants

from phatgoose.errors import DownloadError, ExpertError, PoolError
from phatgoose.experts.adapters.formats import format_of, weights_file
from phatgoose.experts.adapters.peft_lora import check_targets
from phatgoose.experts.files import tokenizer_files
from phatgoose.experts.hub.fetch import (
    MAX_BYTES,
    TEXT_BYTES,
    Fetched,
    Listing,
    fetch,
    from_cache,
    hub_errors,
    list_files,
)
from phatgoose.experts.hub.place import Place
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.names import (
    CARD_FILE,
    CONFIG_FILE,
    GATES_FILE,
    HEAD_FILES,
    INTERFACE_FILE,
    MANIFEST,
    PEFT_WEIGHTS,
    RECORD_FILE,
    SIGNATURE_FILE,
    WEIGHTS_FILES,
    slug,
)
from phatgoose.files import atomic_folder, cache_folder, read_json, storage_errors
from phatgoose.hub_errors import is_offline
from phatgoose.records import HubSource

OPTIONAL = (GATES_FILE, SIGNATURE_FILE, RECORD_FILE, CARD_FILE)
"""Files of an expert that a repository may lack."""


@dataclass(frozen=True)
class Pulled:
    """Files of one commit, as a folder of plain files in our cache."""

    folder: Path
    source: HubSource
    name: str | None
    """What to call an expert whose files don't name it: the folder is named after the commit."""
    files: tuple[str, ...] = ()
    """A pool's files, relative to its folder."""

    def copy(self, target: Path) -> None:
        """Copies a pool's files to `target`, byte for byte, all or none."""
        with atomic_folder(target) as work:
            for name in self.files:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, work / name)


def pull_expert(
    place: Place, drop: Collection[str], token: str | bool | None, max_bytes: int | None
) -> Pulled:
    """The files of the expert in a repository, or in a folder of one."""
    with hub_errors(f"fetch {place}", place.repo, token):
        remote = _Remote(place, token, max_bytes, _check_is_expert)
        # The config comes first: it names the weights file, and may already be a reason to refuse the adapter.
        config = read_json(_lay_out(place, remote.get((CONFIG_FILE,), ())) / CONFIG_FILE, ExpertError)
        weights, optional = PEFT_WEIGHTS, list(OPTIONAL)
        if isinstance(config, dict):
            weights = weights_file(config)
            if format_of(config) == "AdapterHub":
                optional.append(INTERFACE_FILE)
                if "prediction_head" not in drop and (heads := remote.find(HEAD_FILES)):
                    raise ExpertError(
                        f"{place} has a prediction head of its own ({heads[0]}). If it is the base's own, which "
                        "the library saves along, leave it out with drop=('prediction_head',) (--drop). A head "
                        "that was trained can't be routed."
                    )
            else:
                check_targets(config, str(place))
        fetched = remote.get((weights,), optional)
        tokenizer = remote.beside(tokenizer_files.SMALL)
        folder = _lay_out(place, Fetched(fetched.revision, {**fetched.paths, **tokenizer}))
    name = slug((place.subfolder or place.repo).rpartition("/")[2])
    named = place.path(RECORD_FILE) in fetched.paths
    return Pulled(folder, HubSource(place.repo, fetched.revision, place.subfolder), None if named else name)


def pull_pool(place: Place, token: str | bool | None, max_bytes: int | None) -> Pulled:
    """The files of the pool in a repository, or in a folder of one."""
    with hub_errors(f"fetch {place}", place.repo, token):
        remote = _Remote(place, token, max_bytes, _check_is_pool)
        first = remote.get((MANIFEST,), (CARD_FILE,))
        manifest = read_manifest(_lay_out(place, first))
        if "packed" in manifest:
            raise DownloadError(f"{place} is a packed pool, which isn't fetched: unpack it and publish that.")
        entries = manifest["experts"]
        files = [f"{entry['folder']}/{name}" for entry in entries for name in entry["files"]]
        rest = remote.get(files, [f"{entry['folder']}/{CARD_FILE}" for entry in entries])
        folder = _lay_out(place, rest)
    names = tuple(name.removeprefix(place.path("")) for name in (*first.paths, *rest.paths))
    return Pulled(folder, HubSource(place.repo, rest.revision, place.subfolder), None, names)


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that a pool can't be copied to."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise PoolError(f"{folder} exists and holds something else than a pool; choose another folder.")
    if not overwrite:
        raise PoolError(
            f"{folder} is a pool already: choose another folder, or replace it (overwrite, --overwrite)."
        )


def _lay_out(place: Place, fetched: Fetched) -> Path:
    """The fetched files as a folder of plain files, in our cache: huggingface_hub's is made of links, which we
    don't follow.

    They take no space of their own where the file system can link them.
    """
    root = cache_folder() / "hub" / place.repo.replace("/", "--") / fetched.revision
    for name, path in fetched.paths.items():
        target = root / name
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=target.parent)) / "file"
            try:
                try:
                    os.link(path.resolve(), new)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(path, new)
                os.replace(new, target)
            finally:
                shutil.rmtree(new.parent, ignore_errors=True)
    return root / place.subfolder


class _Remote:
    """One commit of a repository: the one that the place's revision names when the first file is asked for.

    Files come from huggingface_hub's cache if the user forbids the network, or if a commit is given and the cache
    has all of them; else from the Hub.
    """

    def __init__(
        self,
        place: Place,
        token: str | bool | None,
        max_bytes: int | None,
        check: Callable[[Place, Listing], None],
    ) -> None:
        self.place, self.token, self.check = place, token, check
        self.max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        self.listing: Listing | None = None

    def get(self, required: Sequence[str], optional: Sequence[str]) -> Fetched:
        """Fetches files of the place's folder."""
        needed, extra = ([self.place.path(name) for name in names] for names in (required, optional))
        fetched = self._cached(needed, extra)
        if fetched is None:
            fetched = fetch(self.place, self._listed(), needed, extra, self.token, self.max_bytes)
        self.place = Place(self.place.repo, fetched.revision, self.place.subfolder)
        return fetched

    def find(self, names: Sequence[str]) -> list[str]:
        """Which of these files the commit has; they aren't fetched."""
        paths = [self.place.path(name) for name in names]
        if (known := self._cached([], paths)) is not None:
            return list(known.paths)
        listing = self._listed()
        fetch(self.place, listing, [], [p for p in paths if p not in listing.files], self.token)
        return [path for path in paths if path in listing.files]

    def beside(self, names: Sequence[str]) -> dict[str, Path]:
        """Fetches those of these small files that are known to exist, without asking the Hub again."""
        paths = [self.place.path(name) for name in names]
        if self.listing is not None:
            files, limit = self.listing.files, min(TEXT_BYTES, self.max_bytes)
            there = [path for path in paths if path in files and files[path].size <= limit]
            return dict(fetch(self.place, self.listing, there, [], self.token, self.max_bytes).paths)
        found: dict[str, Path] = {}
        for path in paths:
            # The cache may have been filled by a version that didn't ask for these files.
            with contextlib.suppress(LookupError):
                found |= from_cache(self.place, [], [path]).paths
        return found

    def _cached(self, needed: Sequence[str], extra: Sequence[str]) -> Fetched | None:
        # A branch or a tag may have moved since it was cached, so the Hub is asked unless that is forbidden.
        if self.listing is not None or not (self.place.commit or is_offline()):
            return None
        try:
            return from_cache(self.place, needed, extra)
        except LookupError as lacking:
            if is_offline():
                raise DownloadError(
                    f"can't fetch {self.place}: {lacking} isn't in the Hub cache "
                    f"({huggingface_hub.constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: unset it, or fetch it "
                    "once where there is a network."
                ) from None
        return None

    def _listed(self) -> Listing:
        if self.listing is None:
            self.listing = list_files(self.place.repo, self.place.revision, self.token)
            self.check(self.place, self.listing)
        return self.listing


def _check_is_expert(place: Place, listing: Listing) -> None:
    names = listing.below(place)
    if CONFIG_FILE not in names:
        if MANIFEST in names:
            first = next(
                (n.rpartition("/")[0] for n in sorted(names) if n.endswith(f"/{CONFIG_FILE}")), "experts/NAME"
            )
            raise DownloadError(
                f"{place} is a pool, not an expert: use Pool.pull (`phatgoose pool pull`), or one of its experts, "
                f'"{place.repo}@{listing.revision}:{first}".'
            )
        what = "a model, not an adapter" if "config.json" in names else "no adapter"
        raise DownloadError(
            f"{place} is {what}: it has no {CONFIG_FILE} (found {sorted(names)[:8] or 'nothing'})."
        )
    pickles = sorted(n for n in names if n.endswith((".bin", ".pt")) and "/" not in n)
    if pickles and not names & {*WEIGHTS_FILES}:
        raise DownloadError(
            f"{place} has its weights in {pickles[0]}, a pickle, which is refused, because opening one can run "
            "code. If you trust its author, load it with the library that made it and save it again as "
            f"{' or '.join(WEIGHTS_FILES)}."
        )


def _check_is_pool(place: Place, listing: Listing) -> None:
    names = listing.below(place)
    if MANIFEST not in names:
        hint = " It is an expert: use Expert.pull, or `phatgoose pool add`." if CONFIG_FILE in names else ""
        raise DownloadError(
            f"{place} is no pool: it has no {MANIFEST} (found {sorted(names)[:8] or 'nothing'}).{hint}"
        )
