"""Lock a folder, so that one run works on it at a time. A killed process releases the lock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from phatgoose.errors import StorageError
from phatgoose.files import storage_errors


@contextlib.contextmanager
def only_run(folder: Path, lock: Path) -> Iterator[None]:
    """Locks `folder` while a command works on what it will write there. The lock of a killed process is released.

    On a file system without locks two runs may do the same work; what they write is still whole.

    Args:
        lock: the lock file, which is removed in the end.

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
