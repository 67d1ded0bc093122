"""Lock what is written, so that one process works on it at a time. A killed process releases its lock."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from phatgoose.errors import PhatgooseError, StorageError
from phatgoose.files import storage_errors

NOTICE_SECONDS = 5.0
"""After how long to say what is waited for."""
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(
    lock: Path,
    place: str,
    seconds: float = math.inf,
    refusal: PhatgooseError | None = None,
    *,
    needed: bool = False,
) -> Iterator[None]:
    """Holds the file `lock` while the block runs; after a few seconds of waiting for it, a warning is logged.

    Args:
        place: what is locked, as the warning names it.
        seconds: how long to wait for another process; then `refusal` is raised.
        needed: on a file system without locks, raise an error; else two processes may do the same work there.

    Raises:
        StorageError: the lock can't be written.
    """
    held = FileLock(lock)
    with storage_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                held.acquire(timeout=min(NOTICE_SECONDS, seconds))
            except Timeout:
                if seconds <= NOTICE_SECONDS:
                    raise
                _log.warning("waiting until another process is done with %s (%s)", place, lock)
                held.acquire(timeout=seconds - NOTICE_SECONDS)
        except Timeout as cause:
            raise refusal or cause from None
        except OSError as error:
            if needed or error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def only_run(folder: Path, lock: Path) -> Iterator[None]:
    """Locks `folder` while a command works there, or refuses it at once. The lock file is removed in the end."""
    busy = f"another run is at work in {folder}: wait until it has ended, end it, or choose another folder."
    with locked(lock, str(folder), 0.2, StorageError(busy)):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                lock.unlink()
