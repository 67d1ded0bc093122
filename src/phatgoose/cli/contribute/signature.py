"""`phatgoose signature`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.common.options import (
    DeviceOption,
    DtypeOption,
    LimitTrainOption,
    RecordedBaseOption,
    TaskOption,
    with_settings,
)
from phatgoose.cli.measure import show
from phatgoose.training.config import SignatureConfig

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert


@with_settings(SignatureConfig)
def command(
    expert: Annotated[Path, typer.Argument(help="The expert's folder; a plain PEFT folder will do.")],
    config: SignatureConfig,
    task: TaskOption,
    base: RecordedBaseOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where the expert with its signature goes; into its own folder if not given."
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", help="Where the sums so far are kept until it is done; OUT.work if not given."
        ),
    ] = None,
    limit_train: LimitTrainOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another signature that is there already.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Make an expert's data signature: what its own training rows look like, for routers that need no gates.

    Mean activations at every adapted module (average-activation), and embeddings of training prompts (retrieval, centroid,
    soft-centroid). Nothing is trained. Use the rows the expert was trained on. Stopped, the same command goes on.
    """
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load_recorded
    from phatgoose.errors import ExpertError
    from phatgoose.experts.expert import Expert
    from phatgoose.tasks import load_task

    target = out or expert
    folders.check_target(target, keeps_card=out is None or out == expert)
    with folders.only_run(target, "signature"):
        work = work or target.with_name(target.name + ".work")
        source = Expert.load(expert)
        rows = load_task(task, limit=None if limit_train is None else {"train": limit_train})
        model = load_recorded([source], base, dtype, device)
        from phatgoose.models.base.sentence_encoder import load_encoder
        from phatgoose.training.signature import make_signature, signature_key

        encoder = load_encoder(config.encoder) if config.texts else None
        before = source if target == expert else folders.standing(target)
        there = before or source
        if there.signature is not None and not overwrite:
            made = there.provenance.get("signature", {})
            if not isinstance(made, dict) or made.get("key") != signature_key(
                model, source, rows, config, encoder
            ):
                raise ExpertError(
                    f"{target} holds another signature or another expert: choose another --out, or replace it with --overwrite."
                )
            show.say(f"{target} has this very signature, finished before.")
            folders.clear_work(work, "signature")
            _summary(there, target)
            return
        signed = make_signature(model, source, rows, config, work_folder=work)
        signed = folders.laid_over(target, signed, before, "signature", work)
        signed.save(target)
        folders.clear_work(work, "signature")
        _summary(signed, target)


def _summary(expert: Expert, target: Path) -> None:
    from phatgoose.experts.data_signature import describe

    record = expert.provenance["signature"]
    rows = [("signature", f"{expert.name}: {describe(record)}")]
    if record["texts_cut"]:
        rows.append(("cut", f"{record['texts_cut']} of the texts are longer than the encoder reads"))
    rows += [
        ("saved", str(target)),
        ("next", shlex.join(["phatgoose", "pool", "create", "POOL", str(target), "..."])),
    ]
    show.facts(rows)
