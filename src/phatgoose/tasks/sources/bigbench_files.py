"""BIG-bench's task.json files: in a folder of the user, or in the PyPI sdist, unpacked once.

Both have the repository's layout: NAME/task.json, or NAME/SUBTASK/task.json below a NAME/task.json without examples.
Of the sdist (358 MB, 1.9 GB unpacked) only the JSON tasks are kept, gzipped, in the cache folder; nothing else of it is
written, imported, built or run.
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from phatgoose.errors import TaskError, UnknownName
from phatgoose.fetch import PinnedPackage, build_once
from phatgoose.registry import unknown
from phatgoose.tasks.sources.local_files import given_folder, read_json, unpacked_folder

PACKAGE = PinnedPackage(
    "bigbench==1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    "bigbench-1.0.0.tar.gz",
)
_MEMBER = re.compile(r"bigbench-1\.0\.0/bigbench/benchmark_tasks/(\w[\w.-]*(?:/\w[\w.-]*)?)/task\.(json|py)")
_FILES = ("task.json", "task.json.gz")
_PROGRAMS = "programmatic.json"


def root(folder: Path | None) -> Path:
    """The folder that holds the tasks: `folder`, $PHATGOOSE_BIGBENCH, or the cache (fetched on first use)."""
    folder = given_folder(folder, "PHATGOOSE_BIGBENCH")
    if folder is None:
        return build_once(unpacked_folder(PACKAGE), _unpack)
    for inside in (folder, folder / "benchmark_tasks", folder / "bigbench" / "benchmark_tasks"):
        if inside.is_dir() and any(inside.glob("*/task.json*")):
            return inside
    raise TaskError(
        f"{folder} holds no BIG-bench tasks: expected NAME/task.json as in the repository's benchmark_tasks."
    )


def names(folder: Path) -> list[str]:
    """Every NAME and NAME/SUBTASK below `folder`, sorted."""
    found = {
        p.parent
        for pattern in ("*/task.json*", "*/*/task.json*")
        for p in folder.glob(pattern)
        if p.name in _FILES
    }
    return sorted(p.relative_to(folder).as_posix() for p in found)


def find(folder: Path, name: str) -> list[tuple[str, Path, dict[str, Any]]]:
    """(name, file, content) of the task `name`: one, or one for each subtask.

    Raises:
        UnknownName: there is no such task or subtask.
        TaskError: it is a programmatic task, or its file is damaged.
    """
    task, _, subtask = name.partition("/")
    known = names(folder)
    if name not in known:
        subtasks = [n for n in known if n.startswith(f"{task}/")]
        if subtask and subtasks:
            raise unknown(f"subtask of {task}", name, subtasks)
        if name in _programs(folder):
            raise TaskError(
                f"bigbench:{name} is a programmatic task (Python code, no rows); only JSON tasks can be loaded."
            )
        raise _unknown_task(name, known)
    content = read(folder / name)
    if "examples" in content[1]:
        return [(name, *content)]
    children = [n for n in known if n.startswith(f"{name}/")]
    if not children:
        raise TaskError(f'{content[0]}: has neither "examples" nor subtasks.')
    return [(n, *read(folder / n)) for n in children]


def read(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(file, content) of one task folder."""
    path = next(folder / f for f in _FILES if (folder / f).exists())
    data = read_json(path)
    if not isinstance(data, dict):
        raise TaskError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return path, data


def _unknown_task(name: str, known: list[str]) -> UnknownName:
    """Suggests whole tasks, or a subtask of this name (past_tense → linguistic_mappings/past_tense…)."""
    last = name.rpartition("/")[2]
    inside = [n for n in known if "/" in n and last in n.partition("/")[2]]
    hint = f"It looks like {' or '.join(repr(n) for n in inside[:3])}." if inside else ""
    return unknown("bigbench task", name, [n for n in known if "/" not in n], hint)


def _programs(folder: Path) -> set[str]:
    if (folder / _PROGRAMS).is_file():
        return set(json.loads((folder / _PROGRAMS).read_text()))
    return {p.parent.relative_to(folder).as_posix() for p in folder.glob("*/task.py")}


def is_available(folder: Path | None) -> bool:
    """True if the tasks can be read without fetching anything."""
    return given_folder(folder, "PHATGOOSE_BIGBENCH") is not None or unpacked_folder(PACKAGE).is_dir()


def _unpack(work: Path) -> None:
    import rich.progress
    from rich.console import Console

    archive, programs = PACKAGE.fetch(), set()
    with (
        rich.progress.open(
            archive, "rb", description="unpacking BIG-bench", console=Console(stderr=True)
        ) as file,
        tarfile.open(fileobj=file, mode="r|gz") as tar,
    ):
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            if not match or not member.isfile():
                continue
            if match[2] == "py":
                programs.add(match[1])
            elif (content := tar.extractfile(member)) is not None:
                path = work / match[1] / "task.json.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(gzip.compress(content.read(), compresslevel=1, mtime=0))
        if not any(work.glob("*/task.json.gz")):
            raise TaskError(f"{archive} holds no JSON tasks.")
        (work / _PROGRAMS).write_text(json.dumps(sorted(programs)))
