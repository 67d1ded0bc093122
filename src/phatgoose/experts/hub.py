"""Experts and pools from the Hub: fetching them, pinned to a commit. Publishing them: `hub_push`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants

from phatgoose.errors import DownloadError, PhatgooseError, PoolError
from phatgoose.experts.card import CARD_FILE
from phatgoose.experts.expert import GATES_FILE, RECORD_FILE, Expert, slug
from phatgoose.experts.hub_files import MAX_BYTES, Fetched, Listing, fetch, from_cache, list_files
from phatgoose.experts.hub_place import Place
from phatgoose.experts.manifest import MANIFEST, read_manifest
from phatgoose.experts.peft import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.pool import Pool
from phatgoose.files import atomic_folder, cache_folder, storage_errors
from phatgoose.hub_errors import explain, hide_tokens, is_offline
from phatgoose.records import HubSource

REQUIRED = (CONFIG_FILE, WEIGHTS_FILE)
OPTIONAL = (GATES_FILE, RECORD_FILE, CARD_FILE)


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
        fetched = _fetch(place, REQUIRED, OPTIONAL, token, max_bytes, _check_is_expert)
        folder = _lay_out(place, fetched)
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
        first = _fetch(place, (MANIFEST,), (CARD_FILE,), token, max_bytes, _check_is_pool)
        manifest = read_manifest(_lay_out(place, first))
        if "packed" in manifest:
            raise DownloadError(
                f"{place} is a packed pool, which isn't fetched: unpack it, and publish that."
            )
        entries = manifest["experts"]
        files = [f"{entry['folder']}/{name}" for entry in entries for name in entry["files"]]
        cards = [f"{entry['folder']}/{CARD_FILE}" for entry in entries]
        pinned = Place(place.repo, first.revision, place.subfolder)
        rest = _fetch(pinned, files, cards, token, max_bytes, _check_is_pool)
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


def _fetch(
    place: Place,
    required: Sequence[str],
    optional: Sequence[str],
    token: str | bool | None,
    max_bytes: int,
    check: Callable[[Place, Listing], None],
) -> Fetched:
    """From the cache if the user forbids the network, or if a commit is asked for that lies there whole; else from the Hub."""
    needed, extra = ([place.path(name) for name in names] for names in (required, optional))
    if place.commit or is_offline():
        try:
            return from_cache(place, needed, extra)
        except LookupError as lacking:
            if is_offline():
                raise DownloadError(
                    f"can't fetch {place}: {lacking} isn't in the Hub cache ({huggingface_hub.constants.HF_HUB_CACHE}), and "
                    "HF_HUB_OFFLINE is set: unset it, or fetch it once where there is a network."
                ) from None
    listing = list_files(place.repo, place.revision, token)
    check(place, listing)
    return fetch(place, listing, needed, extra, token, max_bytes)


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
    if WEIGHTS_FILE not in inside and (pickles := sorted(n for n in inside if n.endswith((".bin", ".pt")))):
        raise DownloadError(
            f"{place} has its weights in {pickles[0]}, a pickle, which is refused, because opening one can run code. If you trust "
            f"its author, load it with PEFT and save it again: save_pretrained writes {WEIGHTS_FILE}."
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


@contextlib.contextmanager
def refused(
    doing: str, repo: str, token: str | bool | None, kind: type[PhatgooseError] = DownloadError
) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into one error that says what to do, and has no access token in it.

    Raises:
        `kind`; StorageError: no space or permission to keep what is fetched.
    """
    try:
        with storage_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)):
            yield
    except PhatgooseError:
        raise
    except (
        Exception
    ) as error:  # its own errors, its HTTP library's, ValueError, RuntimeError: they have no common type
        secrets = [s for s in (token, huggingface_hub.get_token()) if isinstance(s, str) and s]
        said = explain(error, repo, "repository") or f"{type(error).__name__}: {error}"
        text = hide_tokens(f"can't {doing}: {said}", secrets)
        # What the Hub answered stays attached for whoever wants it, unless a token is in there.
        raise kind(text[:1000]) from (None if _leaks(error, secrets) else error)


def _leaks(error: BaseException | None, secrets: Sequence[str]) -> bool:
    """Whether a token is in an error, or in one that would be printed with it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if _leaks_itself(error, secrets):
            return True
        error = error.__cause__ or error.__context__
    return False


def _leaks_itself(error: BaseException, secrets: Sequence[str]) -> bool:
    text = " ".join(str(error).split())
    return hide_tokens(text, secrets) != text
