"""gate and signature for a whole pool: one expert after the other, with one load of the base."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from phatgoose.cli.common import folders
from phatgoose.cli.common.loading import load_for, record_first_use
from phatgoose.cli.common.options import BaseOptions, RunOptions, WholePoolOptions
from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError, PoolError, TaskError
from phatgoose.experts.expert import Expert
from phatgoose.experts.health import few
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import refuse_packed, replace_in_folder
from phatgoose.models.base.base import Base
from phatgoose.records import Task
from phatgoose.registry import unknown
from phatgoose.shipped import own_folder
from phatgoose.tasks.load import load_task

Make = Callable[[Base, Expert, Task | None, Path], Expert | None]
"""(base, expert, task or None, work folder) → the expert with its new part; None if it has this very part already."""
_DONE = {"gate": "has gates", "signature": "has a signature"}


def one_task(tasks: Sequence[str] | None) -> str | None:
    """The task of a command for one expert."""
    if tasks and len(tasks) > 1:
        raise typer.BadParameter("one expert has one task; several are for --pool.", param_hint="--task")
    return tasks[0] if tasks else None


def one_expert(experts: Sequence[str] | None) -> Path:
    """The folder of a command for one expert."""
    if not experts or len(experts) > 1:
        raise typer.BadParameter("give one expert's folder, or --pool.", param_hint="EXPERTS")
    return Path(experts[0])


def over_pool(
    options: WholePoolOptions,
    names: Sequence[str] | None,
    tasks: Sequence[str] | None,
    part: str,
    run: RunOptions,
    base: BaseOptions,
    make: Make,
    *,
    without_task: bool = False,
) -> None:
    """Makes a part of several experts of a pool, and writes each back into the pool when it is made.

    Args:
        names: of the experts; None or empty: all.
        tasks: as `--task` takes them.
        part: what is made, "gate" or "signature".
        without_task: no expert has a task.

    Raises:
        PoolError: some experts failed; the others are done.
    """
    assert options.pool is not None
    if (folder := own_folder(options.pool)) is None:
        raise PoolError(
            f"{options.pool} comes with phatgoose, and isn't changed: make a copy of it with `phatgoose pool pull "
            f"{options.pool} FOLDER`."
        )
    refuse_packed(folder, read_manifest(folder))
    pool = Pool.load(folder)
    chosen = [pool[name].name for name in dict.fromkeys(names or pool.names)]
    if options.missing:
        chosen = [name for name in chosen if _part(pool[name], part) is None]
    if not chosen:
        show.say(f"{folder}: every expert {_DONE[part]}.")
        return
    work, failed = run.work_folder(folder), dict[str, str]()
    with folders.only_run(folder, part, work):
        rows = {} if without_task else _tasks(pool, chosen, tasks, run, failed)
        left = [name for name in chosen if name not in failed]
        if not left:
            raise _failure(folder, part, failed, len(chosen))
        model = load_for(pool, base, folder)
        if base.base is None:
            record_first_use(folder, pool, model)
        finished = []
        for number, name in enumerate(left, start=1):
            show.note(f"{name} ({number} of {len(left)})")
            source = pool[name]
            try:
                made = make(model, source, rows.get(name), work / name)
                if made is None:
                    finished.append(name)
                elif folders.is_main_process():
                    now = Pool.load(folder, verify=False)[name]
                    replace_in_folder(folder, folders.merged(folder / name, now, made, source, part))
            except PhatgooseError as error:
                failed[name] = str(error)
                show.warn(f"{name}: {error}")
            else:
                folders.clear(work / name, part)
    done = [name for name in left if name not in failed and name not in finished]
    rows_ = [("made", f"{len(done)}: {few(done, 20)}" if done else "none")]
    if finished:
        rows_.append(("before", f"{len(finished)} were finished before: {few(finished, 20)}"))
    if failed:
        show.facts(rows_)
        raise _failure(folder, part, failed, len(chosen))
    show.facts([*rows_, ("next", f"phatgoose serve --pool {folder}")])


def _part(expert: Expert, part: str) -> object:
    return expert.gates if part == "gate" else expert.signature


def _failure(folder: Path, part: str, failed: Mapping[str, str], count: int) -> PoolError:
    kinds: dict[str, list[str]] = {}
    for name, why in failed.items():
        kinds.setdefault(why.replace(repr(name), "it"), []).append(name)
    lines = [f"{few(names)}: {why}" for why, names in kinds.items()]
    what = f"{len(failed)} of {count} experts of {folder} have no new {part}; the others are done:"
    return PoolError(
        "\n".join([what if len(failed) < count else f"no expert of {folder} could be done:", *lines])
    )


def _tasks(
    pool: Pool, chosen: Sequence[str], given: Sequence[str] | None, run: RunOptions, failed: dict[str, str]
) -> dict[str, Task]:
    """Each expert's task: the one that is given for it, else the one that is given for all, else its record's."""
    specs, for_all = _specs(given or (), pool.names)
    found = {}
    for name in chosen:
        try:
            spec = specs.get(name, for_all)
            if spec is not None:
                found[name] = load_task(spec, limit=run.row_limit)
            else:
                found[name] = _recorded_task(pool[name], run)
        except PhatgooseError as error:
            failed[name] = str(error)
    return found


def _recorded_task(expert: Expert, run: RunOptions) -> Task:
    """The task that an expert's record names, if its rows are those that it was trained on."""
    record: Any = expert.provenance.get("task")
    source: Any = record.get("source") if isinstance(record, dict) else None
    spec = source.get("spec") if isinstance(source, dict) else None
    say = "Say which with `--task NAME=SPEC`, or train gates without its data (`phatgoose gate --generated`)."
    if not isinstance(spec, str):
        raise TaskError(f"no task is recorded with it. {say}")
    try:
        task = load_task(spec, limit=run.row_limit)
    except PhatgooseError as error:
        raise TaskError(f"its recorded task {spec!r} can't be loaded here: {error} {say}") from error
    if task.hash != record.get("hash"):
        raise TaskError(
            f"its recorded task {spec!r} has other rows here than it was trained on (--limit-train sets how many are "
            f"read). {say}"
        )
    return task


def _specs(given: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """(expert → its task's spec, the spec for all others)."""
    specs: dict[str, str] = {}
    for_all = None
    for text in given:
        if text.endswith(".toml"):
            specs |= _read_map(Path(text))
            continue
        name, equals, spec = text.partition("=")
        if equals and ":" not in name:
            specs[name] = spec
        elif for_all is not None:
            raise typer.BadParameter(
                f"{for_all} and {text} are both for all experts: say NAME=SPEC.", param_hint="--task"
            )
        else:
            for_all = text
    for name in specs:
        if name not in names:
            raise unknown("expert", name, names)
    return specs, for_all


def _read_map(file: Path) -> dict[str, str]:
    """The lines NAME = "SPEC" of a TOML file."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise TaskError(f"{file} can't be read as TOML: {cause}.") from cause
    for name, spec in found.items():
        if not isinstance(spec, str):
            raise TaskError(
                f'{file}: {name} is no text; expected lines like "{name}" = "SOURCE:NAME", where a name with dots is '
                "quoted."
            )
    return found
