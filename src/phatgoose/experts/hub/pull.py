"""Experts and pools from the Hub: fetching them, pinned to a commit. Publishing them: `hub_push`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import huggingface_hub.constants

from phatgoose.errors import DownloadError, ExpertError, PoolError
from phatgoose.experts.adapters.adapterhub import HEAD_FILES
from phatgoose.experts.adapters.adapterhub_layers import INTERFACE_FILE
from phatgoose.experts.adapters.formats import WEIGHTS_FILES, format_of, weights_file
from phatgoose.experts.adapters.peft import CONFIG_FILE
from phatgoose.experts.adapters.peft import WEIGHTS_FILE as PEFT_WEIGHTS
from phatgoose.experts.adapters.peft_target_parameters import check_targets
from phatgoose.experts.card.card import CARD_FILE
from phatgoose.experts.data_signature import SIGNATURE_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.files import tokenizer_files
from phatgoose.experts.folder import RECORD_FILE
from phatgoose.experts.gates import GATES_FILE
from phatgoose.experts.hub.errors import refused
from phatgoose.experts.hub.fetch import MAX_BYTES, TEXT_BYTES, Fetched, Listing, fetch, from_cache, list_files
from phatgoose.experts.hub.place import Place
from phatgoose.experts.manifest import MANIFEST, read_manifest
from phatgoose.experts.names import slug
from phatgoose.experts.pool import Pool
from phatgoose.files import atomic_folder, cache_folder, read_json, storage_errors
from phatgoose.hub_errors import is_offline
from phatgoose.records import HubSource

OPTIONAL = (GATES_FILE, SIGNATURE_FILE, RECORD_FILE, CARD_FILE)


def pull_expert(
    place: Place,
    *,
    name: str | None = None,
    drop: Collection[str] = (),
    token: str | bool | None = None,
    max_bytes: int = MAX_BYTES,
) -> Expert:
    """The expert in a repository, or in a folder of one; its files stay in the cache.

    Raises:
        DownloadError: it can't be fetched, is too large, or isn't what the Hub lists. ExpertError: it can't be used.
    """
    with refused(f"fetch {place}", place.repo, token):
        remote = _Remote(place, token, max_bytes, _check_is_expert)
        config = read_json(_lay_out(place, remote.get((CONFIG_FILE,), ())) / CONFIG_FILE, ExpertError)
        others: tuple[str, ...] = OPTIONAL
        if isinstance(config, dict) and format_of(config) == "AdapterHub":
            others = (*OPTIONAL, INTERFACE_FILE)
            if "prediction_head" not in drop and (heads := remote.find(HEAD_FILES)):
                raise ExpertError(
                    f"{place} has a prediction head of its own ({heads[0]}). If it is the base's own, which the library saves "
                    "along, leave it out with drop=('prediction_head',) (--drop). A head that was trained can't be routed."
                )
        elif isinstance(config, dict):
            check_targets(config, str(place))  # before the weights, which are large
        weights = weights_file(config) if isinstance(config, dict) else PEFT_WEIGHTS
        fetched = remote.get((weights,), others)
        beside = remote.beside(tokenizer_files.SMALL)
        folder = _lay_out(place, Fetched(fetched.revision, {**fetched.paths, **beside}))
    if name is None and place.path(RECORD_FILE) not in fetched.paths:
        name = slug(
            (place.subfolder or place.repo).rpartition("/")[2]
        )  # the folder is called after the commit
    origin = HubSource(place.repo, fetched.revision, place.subfolder)
    return Expert.load(folder, name=name, drop=drop, origin=origin)


def pull_pool(
    place: Place,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    token: str | bool | None = None,
    max_bytes: int = MAX_BYTES,
) -> Pool:
    """The pool in a repository, or in a folder of one; with `folder`, as a copy there, byte for byte, whole or not at all.

    Raises:
        DownloadError: it can't be fetched, is too large, or isn't what the Hub lists.
        PoolError: it is damaged, or `folder` holds something else (or a pool, unless `overwrite`).
    """
    if folder is not None:
        _check_free(folder, overwrite)
    with refused(f"fetch {place}", place.repo, token):
        remote = _Remote(place, token, max_bytes, _check_is_pool)
        first = remote.get((MANIFEST,), (CARD_FILE,))
        manifest = read_manifest(_lay_out(place, first))
        if "packed" in manifest:
            raise DownloadError(
                f"{place} is a packed pool, which isn't fetched: unpack it, and publish that."
            )
        entries = manifest["experts"]
        files = [f"{entry['folder']}/{name}" for entry in entries for name in entry["files"]]
        rest = remote.get(files, [f"{entry['folder']}/{CARD_FILE}" for entry in entries])
        laid_out = _lay_out(place, rest)
    pool = Pool.load(laid_out)
    if folder is not None:
        with atomic_folder(folder) as work:
            for name in (*first.paths, *rest.paths):
                inside = name.removeprefix(place.path(""))
                (work / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(laid_out / inside, work / inside)
    return pool


def _lay_out(place: Place, fetched: Fetched) -> Path:
    """The fetched files as a folder of plain files, in our cache: huggingface_hub's is made of links, which we don't follow.

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
    """One commit of a repository: that which the place's revision stands for when the first file is asked for.

    From the cache if the user forbids the network, or if a commit is asked for and all of it lies there; else from the Hub.
    """

    def __init__(
        self,
        place: Place,
        token: str | bool | None,
        max_bytes: int,
        check: Callable[[Place, Listing], None],
    ) -> None:
        self.place, self.token, self.max_bytes, self.check = place, token, max_bytes, check
        self.listing: Listing | None = None

    def get(self, required: Sequence[str], optional: Sequence[str]) -> Fetched:
        """Files of the place's folder."""
        needed, extra = ([self.place.path(name) for name in names] for names in (required, optional))
        fetched = self._cached(needed, extra)
        if fetched is None:
            fetched = fetch(self.place, self._listed(), needed, extra, self.token, self.max_bytes)
        self.place = Place(self.place.repo, fetched.revision, self.place.subfolder)
        return fetched

    def find(self, names: Sequence[str]) -> list[str]:
        """Which of these files there are; they aren't fetched."""
        paths = [self.place.path(name) for name in names]
        if (known := self._cached([], paths)) is not None:
            return list(known.paths)
        listing = self._listed()
        fetch(self.place, listing, [], [p for p in paths if p not in listing.files], self.token)
        return [path for path in paths if path in listing.files]

    def beside(self, names: Sequence[str]) -> dict[str, Path]:
        """Those of these small files that the commit has, as far as that can be told without asking the Hub again."""
        paths = [self.place.path(name) for name in names]
        if self.listing is not None:
            files, limit = self.listing.files, min(TEXT_BYTES, self.max_bytes)
            there = [path for path in paths if path in files and files[path].size <= limit]
            if not there:
                return {}
            return dict(fetch(self.place, self.listing, there, [], self.token, self.max_bytes).paths)
        found: dict[str, Path] = {}
        for path in paths:
            with contextlib.suppress(LookupError):  # fetched by an earlier version, which didn't look
                found |= from_cache(self.place, [], [path]).paths
        return found

    def _cached(self, needed: Sequence[str], extra: Sequence[str]) -> Fetched | None:
        if self.listing is not None or not (self.place.commit or is_offline()):
            return None
        try:
            return from_cache(self.place, needed, extra)
        except LookupError as lacking:
            if is_offline():
                raise DownloadError(
                    f"can't fetch {self.place}: {lacking} isn't in the Hub cache ({huggingface_hub.constants.HF_HUB_CACHE}), "
                    "and HF_HUB_OFFLINE is set: unset it, or fetch it once where there is a network."
                ) from None
        return None

    def _listed(self) -> Listing:
        if self.listing is None:
            self.listing = list_files(self.place.repo, self.place.revision, self.token)
            self.check(self.place, self.listing)
        return self.listing


def _check_is_expert(place: Place, listing: Listing) -> None:
    inside = _names(place, listing)
    if CONFIG_FILE not in inside:
        if MANIFEST in inside:
            some = next(
                (n.rpartition("/")[0] for n in sorted(inside) if n.endswith(f"/{CONFIG_FILE}")),
                "experts/NAME",
            )
            raise DownloadError(
                f"{place} is a pool, not an expert: use Pool.pull (`phatgoose pool pull`), or one of its experts, "
                f'"{place.repo}@{listing.revision}:{some}".'
            )
        what = "a model, not an adapter" if "config.json" in inside else "no adapter"
        raise DownloadError(
            f"{place} is {what}: it has no {CONFIG_FILE} (found {sorted(inside)[:8] or 'nothing'})."
        )
    pickles = sorted(n for n in inside if n.endswith((".bin", ".pt")) and "/" not in n)
    if pickles and not inside & {*WEIGHTS_FILES}:
        raise DownloadError(
            f"{place} has its weights in {pickles[0]}, a pickle, which is refused, because opening one can run code. If you trust "
            f"its author, load it with the library that made it and save it again as {' or '.join(WEIGHTS_FILES)}."
        )


def _check_is_pool(place: Place, listing: Listing) -> None:
    inside = _names(place, listing)
    if MANIFEST not in inside:
        hint = (
            " It is an expert: use Expert.from_hub, or `phatgoose pool add`." if CONFIG_FILE in inside else ""
        )
        raise DownloadError(
            f"{place} is no pool: it has no {MANIFEST} (found {sorted(inside)[:8] or 'nothing'}).{hint}"
        )


def _names(place: Place, listing: Listing) -> set[str]:
    """Paths below the place's folder, relative to it."""
    prefix = place.path("")
    return {name.removeprefix(prefix) for name in listing.files if name.startswith(prefix)}


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise PoolError(f"{folder} exists and holds something else than a pool; choose another folder.")
    if not overwrite:
        raise PoolError(
            f"{folder} is a pool already: choose another folder, or replace it (overwrite, --overwrite)."
        )
