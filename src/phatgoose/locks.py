"""One run at a time: a lock that a killed process gives back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from phatgoose.errors import StorageError
from phatgoose.files import storage_errors


@contextlib.contextmanager
def only_run(folder: Path, lock: Path) -> Iterator[None]:
    """Held while a command works towards what it writes to `folder`; a process that is killed gives it back.

    Where the file system has no locks, two runs may do the same work; what they write is still whole.

    Args:
        lock: the file that is locked; it is removed in the end.

    Raises:
        StorageError: another process holds it, or it can't be written.
    """
    with storage_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0.2)
        try:
            held.acquire()
        except Timeout:
            raise StorageError(
                f"another run is at work in {folder}: wait until it has ended, end it, or choose another folder."
            ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            lock.unlink()
        held.release()
