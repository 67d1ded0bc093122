"""`load_task`: a spec → a Task, through the table of sources; specs without local paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phatgoose.errors import PluginError, TaskError, UnknownName, brief
from phatgoose.records import SPLITS, SplitName, Task
from phatgoose.registry import Registry, unknown
from phatgoose.tasks.narrow import OPTIONS, narrowed
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.spec import TaskSpec, split_spec
from phatgoose.tasks.splits import Fractions

SOURCES = Registry(
    "task source",
    "phatgoose.tasks",
    {
        "bigbench": "phatgoose.tasks.sources.bigbench:SOURCE",
        "bbh": "phatgoose.tasks.sources.bbh:SOURCE",
        "jsonl": "phatgoose.tasks.sources.local_rows:SOURCE",
        "hf": "phatgoose.tasks.sources.hf:SOURCE",
        "p3": "phatgoose.tasks.sources.p3:SOURCE",
        "prompted": "phatgoose.tasks.sources.prompted:SOURCE",
        "flan": "phatgoose.tasks.sources.flan:SOURCE",
    },
)
"""Name of a source → its `TaskSource`, imported on first use; other packages add theirs (docs/extending.md)."""


def find_source(name: str) -> TaskSource:
    """The source of this name. Raises UnknownName if there is none, PluginError if another package's can't be used."""
    source = SOURCES[name]
    if not isinstance(source, TaskSource):
        raise PluginError(
            f"the task source {name!r} of the package {SOURCES.package(name)} is {brief(source)}, expected a "
            "phatgoose.tasks.TaskSource."
        )
    return source


def load_task(
    spec: str,
    *,
    folder: str | Path | None = None,
    fractions: Fractions | None = None,
    limit: int | Mapping[SplitName, int] | None = None,
) -> Task:
    """The task that `spec` names, as `source:name` with options: docs/tasks.md has the forms of each source.

    Args:
        folder: where a source finds its data instead of fetching it (bigbench, bbh, p3, prompted, flan), or
            what a relative path starts from (jsonl, hf).
        fractions: how much is kept for test and validation where the source has no splits of its own; see `splits`.
        limit: at most this many rows in each split, or in the splits named. The first n rows are a random sample.

    Raises:
        UnknownName: no such source, task, subtask or option (with suggestions).
        TaskError: the data is missing, malformed or empty.
        DownloadError, StorageError: it can't be fetched or kept.
    """
    source, parsed = _parse(spec)
    task = source.load(parsed, _expanded(folder), fractions or Fractions())
    task = narrowed(task, parsed, own=source.options)
    record = {"spec": spec, "source": parsed.source} | task.source
    record |= {"folder": str(folder)} if folder is not None else {}
    if limit is None:
        return replace(task, source=record)
    limits: dict[SplitName, int] = dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else dict(limit)
    if wrong := [f"{k}: {v}" for k, v in limits.items() if k not in SPLITS or v < 0]:
        raise TaskError(
            f"limit of {', '.join(wrong)}: expected train, validation or test and a number of at least 0."
        )
    return replace(task.cut(limits), source=record | {"limit": limits})


def check_task(spec: str, folder: str | Path | None = None) -> str | None:
    """Checks a spec without fetching anything or reading rows.

    Returns:
        None if `load_task` will find the task, or what remains unknown, in words for people.

    Raises:
        What `load_task` would, as far as that can be told: an unknown source, name, split or option, a missing file.
    """
    source, parsed = _parse(spec)
    return source.check(parsed, _expanded(folder))


def list_tasks(source: str, *, folder: str | Path | None = None) -> list[str]:
    """Names that `source` knows (bigbench: tasks, NAME/SUBTASK; bbh), sorted. Raises UnknownName if it lists none."""
    list_names = find_source(source).list_names if source in SOURCES else None
    if list_names is None:
        can = [name for name in SOURCES.table if find_source(name).list_names is not None]
        raise unknown("task source that can be listed", source, can)
    return list_names(_expanded(folder))


def _parse(spec: str) -> tuple[TaskSource, TaskSpec]:
    parsed = split_spec(spec)
    source = find_source(parsed.source)
    parsed.check_options((*source.options, *OPTIONS))
    return source, parsed


def _expanded(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder).expanduser()


def without_paths(source: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `source` as it may be published: without folders, and with only the last part of local paths."""
    kept = {key: value for key, value in source.items() if key != "folder"}
    if "spec" in kept:
        kept["spec"] = " + ".join(without_path(part) for part in str(kept["spec"]).split(" + "))
    if "parts" in kept:
        kept["parts"] = [without_paths(part) for part in kept["parts"]]
    return kept


def without_path(spec: str) -> str:
    """A task's spec as it may be published: of a local file only the name."""
    source, _, rest = spec.partition(":")
    name, mark, query = rest.partition("?")
    return f"{source}:{Path(name).name}{mark}{query}" if is_local(spec) else spec


def is_local(spec: str) -> bool:
    """True if a spec reads a file or folder of this machine: always for a source whose specs name paths
    (`TaskSource.local`), for others if it names a path.

    Only this spec's source is imported. One that isn't installed, or that is broken, can't be asked: then the
    name alone decides.
    """
    source, _, rest = spec.partition(":")
    parsed = TaskSpec(source.strip(), rest.partition("?")[0].strip())
    if parsed.has_path:
        return True
    try:
        return find_source(parsed.source).local
    except (UnknownName, PluginError):
        return False
