"""`phatgoose tasks`: what can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli import show

app = typer.Typer(
    help="List the tasks of a collection (bigbench if none is named), or look into one. "
    "Other sources need no list: jsonl:PATH, hf:DATASET, p3:CONFIG.",
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


@app.command("show")
def show_(
    spec: Annotated[
        str, typer.Argument(help="The task: bigbench:NAME, bbh:NAME, jsonl:PATH, hf:DATASET or p3:CONFIG.")
    ],
    folder: FolderOption = None,
) -> None:
    """Show a task's splits, its hash, and two prompts as the model sees them."""
    from phatgoose.records import SPLITS
    from phatgoose.tasks import load_task

    task = load_task(spec, folder=folder)
    rows = [("task", task.name), ("hash", task.hash)]
    rows += [(split, f"{len(task.split(split))} rows") for split in SPLITS]
    show.facts(rows)
    examples = [e for split in SPLITS for e in task.split(split)][:2]
    for number, example in enumerate(examples, start=1):
        show.say(f"\n--- example {number} ---\n{example.input}")
        show.say(f"--- answer{'s' if len(example.targets) > 1 else ''}: {' | '.join(example.targets)}")
        if example.choices is not None:
            show.say(f"--- choices: {' | '.join(example.choices)}")


def _list(source: str, match: str, folder: Path | None) -> None:
    from phatgoose.errors import TaskError
    from phatgoose.tasks import list_tasks

    found = [name for name in list_tasks(source, folder=folder) if match.casefold() in name.casefold()]
    if not found:
        raise TaskError(f"no task of {source} has {match!r} in its name.")
    for name in found:
        show.say(f"{source}:{name}")
