"""Write files whole or not at all, and read them with clear errors.

A killed process or a full disk never leaves half of a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import operator
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from phatgoose.errors import PhatgooseError, StorageError
from phatgoose.strict_json import parse_json

JSON_LIMIT_BYTES = 64 * 2**20
_UMASK = os.umask(0o077)  # it can only be read by setting it: done here, before there are threads
os.umask(_UMASK)


def cache_folder() -> Path:
    """Where downloads and converted bases are kept: $PHATGOOSE_CACHE, else $XDG_CACHE_HOME/phatgoose, else ~/.cache."""
    if explicit := os.environ.get("PHATGOOSE_CACHE"):
        return Path(explicit).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "phatgoose"


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write below `path` into a StorageError with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left to write {path}; nothing there was changed. Free some space and run it again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"no permission to write {path}; nothing there was changed.") from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
            raise StorageError(
                f"can't write {path}: {error.strerror}. Is there a file where a folder should be, or the reverse?"
            ) from error
        # For example a name that is too long, or links in a circle. An error without a file name is about a network.
        if error.filename is not None or error.errno in (errno.EIO, errno.EFBIG):
            raise StorageError(f"can't write {path}: {error}") from error
        raise


@contextlib.contextmanager
def atomic_folder(target: Path, like: Path | None = None) -> Iterator[Path]:
    """A new folder beside `target` to write into. On success it replaces `target`, on error it is removed.

    An existing `target` is exchanged for the new folder in one step, or moved aside first if the system can't
    do that, and then removed. So a reader never sees half a folder. The new folder takes its permissions.

    Args:
        like: a folder that the content comes from, whose permissions a new one takes. None: the umask decides.

    Raises:
        StorageError: there is no space or no permission, or `target` exists and is no folder.
    """
    target = Path(target)
    if os.path.lexists(target) and not target.is_dir():
        raise StorageError(
            f"can't write a folder to {target}: something that isn't a folder is there. Choose another name."
        )
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        with storage_errors(target):
            yield work
            _take_modes(work, next((f for f in (target, like) if f is not None and f.is_dir()), None))
            for file in work.rglob("*"):
                if file.is_file():
                    _sync(file)
            if target.exists() and _exchange(work, target):
                pass  # what was there goes with `work`
            elif target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
                os.replace(target, old / "old")
                try:
                    os.replace(work, target)
                except BaseException:
                    os.replace(old / "old", target)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(work, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _mode(path: Path, new: int) -> int:
    """The permissions of the file at `path`, else those of a new file or folder (`new`: 0o666, 0o777) by the umask."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    return new & ~_UMASK


def _take_modes(work: Path, before: Path | None) -> None:
    """Gives a new folder and its files the permissions of those in `before`.

    A file that isn't in `before` gets only permissions that all others have.

    Without `before`, the umask decides.
    """
    files = [p for p in work.rglob("*") if p.is_file()]
    old = {p: before / p.relative_to(work) for p in files} if before else {}
    known = {p: _mode(there, 0o666) | 0o600 for p, there in old.items() if there.is_file()}
    new = functools.reduce(operator.and_, known.values(), 0o666 & ~_UMASK)
    for file in files:
        file.chmod(known.get(file, new))
    work.chmod(
        _mode(before, 0o777) | 0o700 if before else 0o777 & ~_UMASK
    )  # mkdtemp's 0700 would keep everybody out of a shared pool


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two paths in one step, so that neither is ever missing. False if the system can't (not Linux)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


@contextlib.contextmanager
def work_place(folder: str | Path | None) -> Iterator[Path]:
    """Where unfinished work is kept: `folder`, or if None a temporary folder that is removed in the end."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as temporary:
        yield Path(temporary)


def write_bytes(path: Path, *data: bytes | memoryview) -> None:
    """Writes `path`, all pieces of `data`, whole or not at all; an existing file's permissions stay.

    Raises:
        StorageError: there is no space or no permission, or `path` is no ordinary file (a folder, a device, a
            pipe), which a rename would remove. What exists stays as it was.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise StorageError(
            f"can't write {path}: something that isn't an ordinary file is there. Choose another name."
        )
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, _mode(path, 0o666))
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented UTF-8 JSON, whole or not at all. NaN and infinity are refused."""
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def open_regular(path: Path, error: type[PhatgooseError]) -> Iterator[tuple[BufferedReader, int]]:
    """An ordinary file opened for reading, and its size in bytes. Anything else is refused without waiting for it.

    Raises:
        PhatgooseError: of the type `error`: no such file, no permission, or a folder, a pipe, a socket or a
            device, which may never end. Errors while the file is read are raised as `error`, too.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except (OSError, ValueError) as cause:  # ValueError: a zero byte in the path
        raise error(f"{path} can't be read: {cause}") from cause
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a file that can be read (a folder, pipe or device).")
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file, status.st_size
    except OSError as cause:
        raise error(f"{path} can't be read: {cause}") from cause
    finally:
        os.close(handle)


def is_folder(path: Path, error: type[PhatgooseError]) -> bool:
    """Whether a path is a folder. No permission to look is an `error`."""
    try:
        return path.is_dir()
    except OSError as cause:
        raise error(f"{path} can't be read: {cause.strerror}.") from cause


def inside(folder: Path, name: str, error: type[PhatgooseError]) -> Path:
    """`folder`/`name`, which may be missing; if it is a link it must stay in the folder.

    A download in the Hub's cache may also lead to that cache's own blobs (…/snapshots/REVISION/… → …/blobs/…).
    A link that leads elsewhere is an `error`.
    """
    path = folder / name
    try:
        place, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as cause:  # links in a circle, a name too long, a zero byte
        raise error(f"{path} can't be read: {cause}") from cause
    blobs = next((p.parent / "blobs" for p in root.parents if p.name == "snapshots"), None)
    if place.is_relative_to(root) or (blobs is not None and place.is_relative_to(blobs)):
        return path
    raise error(
        f"{path} is a link that leads out of its folder; it is not followed. Put the file itself there."
    )


def read_bytes(path: Path, error: type[PhatgooseError], limit_bytes: int) -> bytes:
    """The bytes of an ordinary file; anything wrong with it, and more than `limit_bytes`, is raised as `error`."""
    with open_regular(Path(path), error) as (file, size):
        raw = b"" if size > limit_bytes else file.read(limit_bytes + 1)  # the size may be another by now
    if (size := max(size, len(raw))) > limit_bytes:
        raise error(f"{path} is {size} bytes; a file of its kind has at most {limit_bytes}.")
    return raw


def as_json(raw: bytes, path: Path, error: type[PhatgooseError]) -> Any:
    """The JSON in the bytes of the file `path`, as strict as `parse_json`; what is wrong is raised as `error`."""
    try:
        return parse_json(raw)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not readable as JSON: {cause}") from cause


def read_json(path: Path, error: type[PhatgooseError], limit_bytes: int = JSON_LIMIT_BYTES) -> Any:
    """The JSON in `path`: see `read_bytes` and `as_json`."""
    return as_json(read_bytes(path, error, limit_bytes), path, error)


def sha256_file(
    path: Path, error: type[PhatgooseError] = StorageError, limit_bytes: int | None = None
) -> str:
    """Hex sha256 of a file's bytes; if it can't be read, or is larger than `limit_bytes`, `error` says so."""
    with open_regular(Path(path), error) as (file, size):
        if limit_bytes is not None and size > limit_bytes:
            raise error(f"{path} is {size} bytes; at most {limit_bytes} can be read here.")
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(data: Any) -> str:
    """Hex sha256 of `data` as canonical JSON (sorted keys): the key of finished work."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
