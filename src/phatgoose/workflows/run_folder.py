"""The folder of a run: marked as its own, and locked so that one run at a time works in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from phatgoose.errors import StorageError
from phatgoose.files import storage_errors
from phatgoose.locks import only_run

MADE = ("experts", "pool", "scores", "work")


@contextlib.contextmanager
def locked_folder(out: Path, kind: str) -> Iterator[None]:
    """Marks `out` as the folder of a `kind` of run ("quickstart", "experiment") and locks it; others' folders stay
    as they are.

    Raises:
        StorageError: it is a folder of something else, or another run is at work in it.
    """
    marker = out / f".phatgoose-{kind}"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.exists())):
        raise StorageError(
            f"{out} exists and is not {'an' if kind[0] in 'aeiou' else 'a'} {kind}'s folder; choose another one "
            "with --out."
        )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    with only_run(out, out / ".run.lock"):
        yield


def clear(out: Path) -> None:
    """Removes what an earlier run made; call it only while the folder is locked."""
    for name in MADE:
        shutil.rmtree(out / name, ignore_errors=True)
