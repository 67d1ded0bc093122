"""`load_task`: a spec → a Task, through the registry of sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, SplitName, Task
from phatgoose.registry import lookup
from phatgoose.tasks.spec import split_spec
from phatgoose.tasks.splits import Fractions

SOURCES = {
    "bigbench": "phatgoose.tasks.sources.bigbench:load",
    "bbh": "phatgoose.tasks.sources.bbh:load",
    "jsonl": "phatgoose.tasks.sources.jsonl:load",
    "hf": "phatgoose.tasks.sources.hf:load",
    "p3": "phatgoose.tasks.sources.p3:load",
    "prompted": "phatgoose.tasks.sources.prompted:load",
    "flan": "phatgoose.tasks.sources.flan:load",
}
LISTS = {
    "bigbench": "phatgoose.tasks.sources.bigbench:names",
    "bbh": "phatgoose.tasks.sources.bbh:names",
}


def load_task(
    spec: str,
    *,
    folder: str | Path | None = None,
    fractions: Fractions | None = None,
    limit: int | Mapping[SplitName, int] | None = None,
) -> Task:
    """The task that `spec` names: `bigbench:NAME[/SUBTASK]`, `bbh:NAME`, `jsonl:PATH`, `hf:DATASET[/CONFIG]`, `p3:CONFIG`,
    `prompted:DATASET[/SUBSET]`, `flan:NAME`.

    Args:
        folder: where a source finds its data instead of fetching it (bigbench, bbh, p3, prompted, flan), or what a relative path
            starts from (jsonl, hf).
        fractions: how much is kept for test and validation where the source has no splits of its own; see `splits`.
        limit: at most this many rows in each split, or in the splits named. The first n rows are a random sample.

    Raises:
        UnknownName: no such source, task, subtask or option (with suggestions).
        TaskError: the data is missing, malformed or empty.
        DownloadError, StorageError: it can't be fetched or kept.
    """
    parsed = split_spec(spec)
    load = lookup("task source", parsed.source, SOURCES)
    where = None if folder is None else Path(folder).expanduser()
    task: Task = load(parsed, where, fractions or Fractions())
    source = task.source | ({"folder": str(folder)} if folder is not None else {})
    if limit is None:
        return replace(task, source=source)
    limits: dict[SplitName, int] = dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else dict(limit)
    if wrong := [f"{k}: {v}" for k, v in limits.items() if k not in SPLITS or v < 0]:
        raise TaskError(
            f"limit of {', '.join(wrong)}: expected train, validation or test and a number of at least 0."
        )
    rows = {name: task.split(name)[: limits.get(name)] for name in SPLITS}
    return Task(task.name, rows["train"], rows["validation"], rows["test"], source | {"limit": limits})


def look(spec: str, folder: str | Path | None = None) -> str | None:
    """What can't be told of a task without fetching or reading rows, for people; None: `load_task` finds it.

    Raises:
        As `load_task` would, as far as that can be told: an unknown source, name, split or option, a missing file.
    """
    parsed = split_spec(spec)
    module = lookup(
        "task source", parsed.source, {s: f"{f.partition(':')[0]}:look" for s, f in SOURCES.items()}
    )
    found: str | None = module(parsed, None if folder is None else Path(folder).expanduser())
    return found


def list_tasks(source: str, *, folder: str | Path | None = None) -> list[str]:
    """Names that `source` knows (bigbench: tasks and NAME/SUBTASK; bbh), sorted.

    Raises:
        UnknownName: `source` isn't one of those that can be listed.
    """
    return lookup("task source that can be listed", source, LISTS)(
        None if folder is None else Path(folder).expanduser()
    )
