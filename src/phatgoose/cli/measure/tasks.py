"""`phatgoose tasks`: list tasks, pools and suites, or look into a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.common.options import SOURCE_NAMES, TASK_HELP
from phatgoose.cli.measure import show
from phatgoose.errors import TaskError
from phatgoose.records import SPLITS
from phatgoose.tasks import list_tasks, load_task
from phatgoose.tasks.load import SOURCES

if TYPE_CHECKING:
    from phatgoose.tasks.lists.entries import Entry

app = typer.Typer(
    help="List the tasks of a collection (bigbench if none is named), of a named pool or suite, or look into one. "
    f"Tasks come from {SOURCE_NAMES}; not all of these can be listed.",
    invoke_without_command=True,
)
MatchOption = Annotated[str, typer.Option("--match", help="Only names that contain this, in any case.")]
FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="Where the collection's files are, instead of fetching them.")
]


@app.callback()
def tasks(ctx: typer.Context, match: MatchOption = "", folder: FolderOption = None) -> None:
    if ctx.invoked_subcommand is None:
        _list("bigbench", match, folder)


@app.command("bigbench")
def bigbench(match: MatchOption = "", folder: FolderOption = None) -> None:
    """List BIG-bench's JSON tasks and their subtasks; fetched on first use (358 MB)."""
    _list("bigbench", match, folder)


@app.command("bbh")
def bbh(match: MatchOption = "", folder: FolderOption = None) -> None:
    """List BIG-bench Hard's tasks."""
    _list("bbh", match, folder)


@app.command("pool")
def pool(
    name: Annotated[
        str | None, typer.Argument(help="The pool; if not given, the names of all.", show_default=False)
    ] = None,
) -> None:
    """List a named pool: each expert and what it is trained on. Nothing is fetched."""
    from phatgoose.tasks.lists.named import POOLS, pool_entries, pool_excluded

    if name is None:
        _counts("pool", "experts", {known: len(pool_entries(known)) for known in POOLS})
        return
    _entries("expert", pool_entries(name))
    if excluded := pool_excluded(name):
        show.say()
        show.table(["left out", "why"], list(excluded.items()))


@app.command("suite")
def suite(
    name: Annotated[
        str | None, typer.Argument(help="The suite; if not given, the names of all.", show_default=False)
    ] = None,
) -> None:
    """List a named suite: each task, what it reads, and the datasets whose experts it refuses. Nothing is fetched."""
    from phatgoose.tasks.lists import named

    if name is None:
        _counts("suite", "tasks", {known: len(named.suite(known).entries) for known in named.SUITES})
        return
    found = named.suite(name)
    _entries("task", found.entries, found.own_copy)
    if found.refuses:
        show.say(f"\nrefused too for a pool with experts on: {', '.join(sorted(found.refuses))}")


@app.command("sources")
def sources(
    name: Annotated[
        str | None,
        typer.Argument(help="The source whose tasks to list; if not given, the sources.", show_default=False),
    ] = None,
    match: MatchOption = "",
    folder: FolderOption = None,
) -> None:
    """List where tasks come from, ours and those of installed packages, or the tasks of a source that can list them."""
    if name is not None:
        _list(name, match, folder)
        return
    show.table(
        ["source", "package"], [(known, SOURCES.package(known)) for known in SOURCES if match in known]
    )


@app.command("show")
def show_(
    spec: Annotated[str, typer.Argument(help=TASK_HELP)],
    folder: FolderOption = None,
) -> None:
    """Show a task's splits, its hash, and two prompts as the model sees them."""
    task = load_task(spec, folder=folder)
    rows = [("task", task.name), ("hash", task.hash)]
    rows += [(split, f"{len(task.split(split))} rows") for split in SPLITS]
    show.facts(rows)
    examples = [e for split in SPLITS for e in task.split(split)][:2]
    for number, example in enumerate(examples, start=1):
        show.say(f"\n--- example {number} ---")
        if example.conversation is None:
            show.say(example.input)
        else:  # the base's chat template makes the prompt
            for message in example.messages()[0]:
                show.say(f"[{message['role']}] {message.get('content') or message.get('tool_calls')}")
        show.say(f"--- answer{'s' if len(example.targets) > 1 else ''}: {' | '.join(example.targets)}")
        if example.choices is not None:
            show.say(f"--- choices: {' | '.join(example.choices)}")


def _list(source: str, match: str, folder: Path | None) -> None:
    found = [name for name in list_tasks(source, folder=folder) if match.casefold() in name.casefold()]
    if not found:
        raise TaskError(f"no task of {source} has {match!r} in its name.")
    for name in found:
        show.say(f"{source}:{name}")


def remarks(entry: Entry, own_copy: Sequence[str] = ()) -> str:
    """What to know of an entry besides its specs; `own_copy` as in `Suite`."""
    found = [
        entry.note,
        f"scored by {entry.metric}" if entry.metric else "",
        "from your own copy" if entry.name in own_copy else "",
        f"{entry.skill} ({entry.domain})" if entry.skill else "",
        f"{entry.tier}: {', '.join(entry.sisters)}" if entry.sisters else entry.tier,
    ]
    return "; ".join(filter(None, found))


def _counts(kind: str, what: str, counts: Mapping[str, int]) -> None:
    show.table([kind, what], [(name, str(count)) for name, count in counts.items()], numbers=[what])


def _entries(first: str, entries: Sequence[Entry], own_copy: Sequence[str] = ()) -> None:
    """One entry per line. Its specs come last, since they may be long, as `phatgoose tasks show` takes them."""
    rows = [(e.name, remarks(e, own_copy), " + ".join(e.specs)) for e in entries]
    if any(note for _, note, _ in rows):
        show.table([first, "note", "reads"], rows)
    else:
        show.table([first, "reads"], [(name, reads) for name, _, reads in rows])
