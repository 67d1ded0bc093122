"""`phatgoose train`."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.common.options import (
    DEFAULT_BASE,
    BaseOption,
    DeviceOption,
    DtypeOption,
    LimitTrainOption,
    TaskOption,
    with_settings,
)
from phatgoose.cli.measure import show
from phatgoose.training.config import ExpertConfig, GateConfig

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert
    from phatgoose.models.base.base import Base
    from phatgoose.records import Task


@with_settings(ExpertConfig)
def command(
    task: TaskOption,
    out: Annotated[
        Path,
        typer.Option("--out", help="The expert's folder, which PEFT (or AdapterHub's library) can load too."),
    ],
    config: ExpertConfig,
    base: BaseOption = DEFAULT_BASE,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the expert is called; like the folder OUT if not given."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Where checkpoints are kept until it is done; OUT.work if not given."),
    ] = None,
    limit_train: LimitTrainOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another expert that is in OUT already.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Train an expert on one task: a LoRA, (IA)³ or bottleneck adapter of the base.

    The defaults are the paper's, which suit a GPU cluster. Stopped, the same command goes on from the last checkpoint.
    """
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load
    from phatgoose.experts.names import slug
    from phatgoose.tasks import load_task

    folders.check_target(out)
    with folders.only_run(out, "train"):
        rows = load_task(task, limit=None if limit_train is None else {"train": limit_train})
        wanted = name or slug(out.name)
        there = None if overwrite else folders.standing(out)
        if there and not (there.name == wanted and folders.made_so(there.provenance, None, rows, config)):
            raise _taken(out)
        model = load(base, dtype, device)
        next_command = _next(out, task, limit_train, dtype, config)
        work = work or out.with_name(out.name + ".work")
        if there:
            if not folders.made_so(there.provenance, model, rows, config):
                raise _taken(out)
            show.say(f"{out} is this very expert, finished before.")
            folders.clear_work(work, "train")
            _summary(there, out, next_command)
            return
        _train(model, rows, config, wanted, work, out, next_command)


def _train(
    model: Base, rows: Task, config: ExpertConfig, name: str, work: Path, out: Path, next_command: str
) -> None:
    from accelerate import PartialState

    from phatgoose.cli.common import folders
    from phatgoose.training.expert import train_expert

    expert = train_expert(model, rows, config, name=name, work_folder=work)
    processes = PartialState()
    processes.wait_for_everyone()  # the others may still be reading the work folder
    if processes.is_main_process:
        expert.save(out)
        folders.clear_work(work, "train")
        _summary(expert, out, next_command)


def _summary(expert: Expert, out: Path, next_command: str) -> None:
    from phatgoose.cli.common import folders

    kinds = ", ".join(sorted({u.kind for u in expert.updates.values()}))
    widths = ", ".join(map(str, sorted({u.width for u in expert.updates.values()} - {0})))
    rows = [
        (
            "expert",
            f"{expert.name}: {kinds}{' of rank ' + widths if widths else ''}, {len(expert.updates)} modules, "
            f"{expert.parameters:,} parameters",
        ),
        ("validation loss", folders.validation(expert.provenance)),
        ("saved", str(out)),
    ]
    truncated = expert.provenance["task"]["rows"]["truncated"]
    if truncated:
        rows.append(("cut", f"{truncated} rows' prompts, at the left, to fit --max-length"))
    if expert.gates is None:
        rows.append(("next", next_command))
    show.facts(rows)


def _next(out: Path, task: str, limit_train: int | None, dtype: str, config: ExpertConfig) -> str:
    """The gate's command, with the expert's settings where they aren't the defaults: the paper's gates have them too."""
    parts = ["phatgoose", "gate", str(out), "--task", task]
    if limit_train is not None:
        parts += ["--limit-train", str(limit_train)]
    if dtype != "auto":
        parts += ["--dtype", dtype]
    for field in fields(GateConfig):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if field.name == "steps" or value == field.default:
            continue
        parts += (
            [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return shlex.join(parts)


def _taken(out: Path) -> Exception:
    from phatgoose.errors import ExpertError

    return ExpertError(
        f"{out} holds another expert (other settings, task, base or name): choose another --out, or replace it with --overwrite."
    )
