"""The folder of a quickstart or an experiment: whose it is, and that one run at a time works in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from phatgoose.errors import StorageError
from phatgoose.files import storage_errors
from phatgoose.locks import only_run

MADE = ("experts", "pool", "scores", "work")


@contextlib.contextmanager
def held(out: Path, what: str) -> Iterator[None]:
    """Makes `out` the folder of a `what` ("quickstart", "experiment") and holds it for one run; files of others are left alone.

    Raises:
        StorageError: it is another's folder, or another run is at work in it.
    """
    marker = out / f".phatgoose-{what}"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.exists())):
        raise StorageError(
            f"{out} exists and is not {'an' if what[0] in 'aeiou' else 'a'} {what}'s folder; choose another one with --out."
        )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    with only_run(out, out / ".run.lock"):
        yield


def forget(out: Path, names: Sequence[str] = MADE) -> None:
    """Removes what a run made; only while the folder is held."""
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)
