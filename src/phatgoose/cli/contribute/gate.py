"""`phatgoose gate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.common.options import (
    TASK_HELP,
    DeviceOption,
    DtypeOption,
    LimitTrainOption,
    RecordedBaseOption,
    with_settings,
)
from phatgoose.cli.measure import show
from phatgoose.training.config import GateConfig

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert

WRITING = "Without the contributor's data (--generated)"


@with_settings(GateConfig)
def command(
    expert: Annotated[Path, typer.Argument(help="The expert's folder; a plain PEFT folder will do.")],
    config: GateConfig,
    task: Annotated[str | None, typer.Option("--task", help=f"{TASK_HELP} Not with --generated.")] = None,
    base: RecordedBaseOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the expert with its gates goes; into its own folder if not given."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Where checkpoints are kept until it is done; OUT.work if not given."),
    ] = None,
    limit_train: LimitTrainOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other gates that are there already.")
    ] = False,
    generated: Annotated[
        bool,
        typer.Option(
            "--generated",
            rich_help_panel=WRITING,
            help="Instead of a task: train on text that the base writes with this expert. Gates from the expert's own data are "
            "better.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            rich_help_panel=WRITING,
            help="A file of prompts, one a line, that the texts answer; without one they begin from nothing. "
            "Encoder–decoders need it.",
        ),
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", min=2, rich_help_panel=WRITING, help="Usable texts wanted.")
    ] = 512,
    text_tokens: Annotated[
        int, typer.Option("--text-tokens", min=1, rich_help_panel=WRITING, help="Most tokens of a text.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", rich_help_panel=WRITING, help="Of the sampling.")
    ] = 1.0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Train an expert's gates: for each module one vector that says which tokens the expert should act on.

    Base and expert stay as they are. Use the rows the expert was trained on; for an expert that came without gates or data
    there is --generated (texts are sampled with --seed). Stopped, the same command goes on.
    """
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load_recorded
    from phatgoose.cli.contribute.generated import wanted
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.files.safetensors_file import all_identical
    from phatgoose.tasks import load_task

    target = out or expert
    folders.check_target(target, keeps_card=out is None or out == expert)
    with folders.only_run(target, "gate"):
        work = work or target.with_name(target.name + ".work")
        source = Expert.load(expert)
        before = source if target == expert else folders.standing(target)
        there = before or source
        if not overwrite and not all_identical(source.tensors, there.tensors):
            raise _taken(target)
        given = {"rows": texts, "max_new_tokens": text_tokens, "temperature": temperature}
        writing = wanted(generated, task, prompts, given, config.seed)
        if writing is not None and limit_train is not None:
            raise typer.BadParameter("--limit-train is for a task's rows; with --generated, say --texts.")
        rows = None
        if task is not None:
            rows = load_task(task, limit=None if limit_train is None else {"train": limit_train})
        record = there.provenance.get("gate", {})
        if (
            there.gates is not None
            and not overwrite
            and not (
                folders.made_so(record, None, rows, config) and (writing is None or writing.made(record))
            )
        ):
            raise _taken(target)
        model = load_recorded([source], base, dtype, device)
        if there.gates is not None and not overwrite:
            if not folders.made_so(record, model, rows, config):
                raise _taken(target)
            show.say(f"{target} has these very gates, finished before.")
            folders.clear_work(work, "gate")
            _summary(there, target)
            return
        from accelerate import PartialState

        from phatgoose.training.gate import train_gate

        if rows is None:
            assert writing is not None
            rows = writing.task(model, source, work)
        gated = train_gate(model, source, rows, config, work_folder=work)
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            gated = folders.laid_over(target, gated, before, "gate", work)
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
    rows += [
        ("saved", str(target)),
        ("next", shlex.join(["phatgoose", "pool", "create", "POOL", str(target), "..."])),
    ]
    show.facts(rows)


def _taken(folder: Path) -> Exception:
    from phatgoose.errors import ExpertError

    return ExpertError(
        f"{folder} holds other gates or another expert: choose another --out, or replace them with --overwrite."
    )
