"""`phatgoose gate`: the gates of an expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import (
    TASK_HELP,
    ExpertArgument,
    ExpertBaseOptions,
    ExpertOutOption,
    RunOptions,
    WritingOptions,
)
from phatgoose.cli.measure import show
from phatgoose.training.config import GateConfig

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert


@expand_options
def command(
    expert: ExpertArgument,
    base: ExpertBaseOptions,
    run: RunOptions,
    writing: WritingOptions,
    config: GateConfig,
    task: Annotated[str | None, typer.Option(help=f"{TASK_HELP} Not with --generated.")] = None,
    out: ExpertOutOption = None,
) -> None:
    """Train an expert's gates: for each module one vector that says which tokens the expert should act on.

    Base and expert stay as they are. Use the rows that the expert was trained on. If they aren't available, use
    --generated (texts are sampled with --seed). If it is stopped, the same command continues.
    """
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load_recorded
    from phatgoose.cli.contribute.generated import wanted_texts
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.files.safetensors_file import all_identical
    from phatgoose.tasks import load_task

    target = out or expert
    folders.check_target(target, keeps_card=target == expert)
    with folders.only_run(target, "gate"):
        work, source = run.work_folder(target), Expert.load(expert)
        before = source if target == expert else folders.existing_expert(target)
        existing = before or source
        if not run.overwrite and not all_identical(source.tensors, existing.tensors):
            raise _taken(target)
        texts = wanted_texts(writing, run, task, config.seed)
        rows = None if task is None else load_task(task, limit=run.row_limit)
        # Checked twice: before the base is loaded, which takes long, as far as the record tells; then in full.
        record = existing.provenance.get("gate", {})
        finished = existing.gates is not None and not run.overwrite
        if finished and not (
            folders.made_so(record, None, rows, config) and (texts is None or texts.made(record))
        ):
            raise _taken(target)
        model = load_recorded([source], base)
        if finished and not folders.made_so(record, model, rows, config):
            raise _taken(target)
        if finished:
            show.say(f"{target} has these very gates, finished before.")
            gated = existing
        else:
            from phatgoose.training.gate import train_gate

            if rows is None:
                assert texts is not None
                rows = texts.task(model, source, work)
            gated = train_gate(model, source, rows, config, work_folder=work)
            if not folders.is_main_process():
                return
            gated = folders.merge_onto(target, gated, before, "gate", work)
            gated.save(target)
        folders.clear_work(work, "gate")
        _summary(gated, target)


def _summary(expert: Expert, target: Path) -> None:
    from phatgoose.cli.common import folders

    record = expert.provenance["gate"]
    rows = [
        ("gates", f"{expert.name}: {len(expert.gates or {})} modules, {record['parameters']:,} parameters"),
        ("validation loss", folders.validation(record)),
    ]
    if share := record.get("cost_share", {}).get("tokens"):
        rows.append(("cost", f"{share:.0%} as many tokens as the expert was trained on"))
    show.facts([*rows, *folders.pool_next(target)])


def _taken(folder: Path) -> Exception:
    from phatgoose.errors import ExpertError

    return ExpertError(
        f"{folder} holds other gates or another expert: choose another --out, or replace them with --overwrite."
    )
