"""`phatgoose train`: an expert on one task."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

import phatgoose
from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import ExpertNameOption, RunOptions, TaskOption, TrainBaseOptions
from phatgoose.cli.measure import show
from phatgoose.training.config import ExpertConfig, GateConfig


@expand_options
def command(
    task: TaskOption,
    out: Annotated[
        Path, typer.Option(help="The expert's folder, which PEFT (or AdapterHub's library) can load too.")
    ],
    base: TrainBaseOptions,
    run: RunOptions,
    config: ExpertConfig,
    name: ExpertNameOption = None,
) -> None:
    """Train an expert on one task: a LoRA, (IA)³ or bottleneck adapter of the base.

    The defaults are the paper's, which suit a GPU cluster. If it is stopped, the same command continues
    from the last checkpoint.
    """
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load
    from phatgoose.experts.names import slug
    from phatgoose.training.expert import train_expert

    folders.check_target(out)
    name, work = name or slug(out.name), run.work_folder(out)
    taken = folders.taken(out, "another expert (other settings, task, base or name)")
    with folders.only_run(out, "train", work):
        rows = phatgoose.load_task(task, limit=run.row_limit)
        expert = None if run.overwrite else folders.existing_expert(out)
        # Checked twice: before the base is loaded, which takes long, as far as the record tells; then in full.
        if expert and not (expert.name == name and folders.made_so(expert.provenance, None, rows, config)):
            raise taken
        model = load(base.base, base.dtype, base.device)
        if expert and not folders.made_so(expert.provenance, model, rows, config):
            raise taken
        if expert:
            show.say(f"{out} is this very expert, finished before.")
        else:
            expert = train_expert(model, rows, config, name=name, work_folder=work)
            if not folders.is_main_process():
                return
            expert.save(out)
        _summary(expert, out, _next(out, task, run.limit_train, base.dtype, config))


def _summary(expert: phatgoose.Expert, out: Path, next_command: str) -> None:
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
    """The command for the gates, with the expert's settings that aren't the defaults: the paper's gates share them."""
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
