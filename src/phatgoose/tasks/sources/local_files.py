"""Files that sources read: found in a folder, as JSON or JSON lines, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.fetch import PinnedPackage
from phatgoose.files import cache_folder, is_folder

_UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)
"""What reading a missing, damaged or misnamed file raises."""


def given_folder(folder: Path | None, variable: str) -> Path | None:
    """`folder`, or else the one that an environment variable names; None if there is neither."""
    named = os.environ.get(variable)
    return Path(named).expanduser() if folder is None and named else folder


def unpacked_folder(package: PinnedPackage) -> Path:
    """Where the cache has what a source keeps of a source distribution, once it was fetched."""
    # The first letters of the hash are part of the name: another pin never meets an older pin's files.
    name = package.requirement.partition("==")[0]
    return cache_folder() / name / f"{package.version}-{package.sha256[:12]}"


def check_folder(folder: Path, content: str) -> None:
    """Raises TaskError if `folder` is no folder; `content` says what was expected in it."""
    if not is_folder(folder, TaskError):
        raise TaskError(f"{folder} is not a folder; expected one with {content}.")


def find_file(folder: Path, stem: str, endings: Iterable[str]) -> Path | None:
    """The first file or folder of this name with one of the endings, or None."""
    paths = (folder / f"{stem}{ending}" for ending in endings)
    return next((path for path in paths if path.exists()), None)


def read_json(path: Path) -> Any:
    """The content of a JSON file, gzipped if its name ends in .gz. Raises TaskError if it can't be read as such."""
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (*_UNREADABLE, json.JSONDecodeError, RecursionError) as cause:
        raise TaskError(f"{path} can't be read: {cause}.") from cause


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every line of a file of JSON lines that isn't blank.

    Raises:
        TaskError: the file is missing, not gzip or UTF-8 as it says, or a line isn't a JSON object.
    """
    number = 0
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise TaskError(
                            f"{path}, line {number}: expected a JSON object, got {type(row).__name__}."
                        )
                    yield number, row
    except FileNotFoundError:
        raise TaskError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, RecursionError) as cause:
        raise TaskError(
            f"{path}, line {number}: not JSON ({cause}). Expected one JSON object per line."
        ) from cause
    except _UNREADABLE as cause:
        past = f" past line {number}" if number else ""
        raise TaskError(f"{path} can't be read{past}: {cause}.") from cause
