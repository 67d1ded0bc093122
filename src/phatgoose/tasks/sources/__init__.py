"""Task sources: one file each, which turns a spec `source:name?options` into a Task.

In: a parsed spec, and a folder or the Hub. Out: a `Task` with its three splits, made by `build_task`. What each source
reads, and its options, are in docs/tasks.md.
A new source is a file here that ends in `SOURCE = TaskSource(…)` (for files of rows `rows_source(…)`), a line in
`SOURCES` of `tasks/load.py`, a test, and a line in docs/tasks.md. Another package registers its own under the
entry-point group `phatgoose.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phatgoose.records import Task
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions


@dataclass(frozen=True)
class TaskSource:
    """How the specs of one source are loaded, checked and listed. `folder` is `load_task`'s, with `~` expanded."""

    load: Callable[[TaskSpec, Path | None, Fractions], Task]
    """(spec, folder, fractions) → the task; ends in `build_task`, which applies the split rule. The spec and the
    source's name are added to the task's record."""
    check: Callable[[TaskSpec, Path | None], str | None]
    """(spec, folder) → None if `load` will find the task, or what remains unknown without fetching or reading
    rows, e.g. "the Hub". Raises what `load` would raise, as far as that can be told."""
    options: tuple[str, ...] = ()
    """Options that a spec may have; others are refused before `load` and `check` are called. With `rows` among
    them, a named pool or suite says how many rows it needs."""
    list_names: Callable[[Path | None], list[str]] | None = None
    """(folder) → all names, sorted, for sources that can list them."""
    local: bool = False
    """Whether what its specs name are paths of local files or folders. What is published then holds only their
    last part, and they are never taken for a public dataset of that name. A name that begins with "/", "." or
    "~" is a path for any source."""
