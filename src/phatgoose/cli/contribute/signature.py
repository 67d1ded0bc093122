"""`phatgoose signature`: the data signature of an expert."""

from __future__ import annotations

from pathlib import Path

import typer

import phatgoose
from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import (
    ExpertBaseOptions,
    ExpertOutOption,
    ExpertsArgument,
    RunOptions,
    TasksOption,
    WholePoolOptions,
)
from phatgoose.cli.measure import show
from phatgoose.errors import ExpertError
from phatgoose.training.config import SignatureConfig


@expand_options
def command(
    base: ExpertBaseOptions,
    run: RunOptions,
    whole: WholePoolOptions,
    config: SignatureConfig,
    experts: ExpertsArgument = None,
    task: TasksOption = None,
    out: ExpertOutOption = None,
) -> None:
    """Make an expert's data signature: what its own training rows look like, for routers that need no gates.

    Mean activations at every adapted module (average-activation), mean prompts (gander:means=true), and embeddings of
    training prompts (retrieval, centroid, soft-centroid). Nothing is trained. Use the rows the expert was trained on.
    With --pool, the experts of a pool get theirs one after the other. If it is stopped, the same command continues.
    """
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load_for
    from phatgoose.cli.common.whole_pool import one_expert, one_task, over_pool
    from phatgoose.models.base.sentence_encoder import load_encoder
    from phatgoose.training.signature import make_signature, signature_key

    def made_so(
        model: phatgoose.Base, source: phatgoose.Expert, signed: phatgoose.Expert, rows: phatgoose.Task
    ) -> bool:
        made = signed.provenance.get("signature", {})
        encoder = load_encoder(config.encoder) if config.texts else None
        key = signature_key(model, source, rows, config, encoder)
        return isinstance(made, dict) and made.get("key") == key

    if whole.pool is not None:
        if out is not None:
            raise typer.BadParameter(
                "signatures of a pool's experts are written into the pool.", param_hint="--out"
            )

        def make(
            model: phatgoose.Base, expert: phatgoose.Expert, rows: phatgoose.Task | None, work: Path
        ) -> phatgoose.Expert | None:
            assert rows is not None
            if expert.signature is None or run.overwrite:
                return make_signature(model, expert, rows, config, work_folder=work)
            if made_so(model, expert, expert, rows):
                return None
            raise ExpertError(
                "it has another signature already: replace it with --overwrite, or leave it out with --missing."
            )

        over_pool(whole, experts, task, "signature", run, base, make)
        return
    expert, spec = one_expert(experts), one_task(task)
    if spec is None:
        raise typer.BadParameter("give the expert's task.", param_hint="--task")
    target = out or expert
    folders.check_target(target, keeps_card=target == expert)
    work = run.work_folder(target)
    with folders.only_run(target, "signature", work):
        source = phatgoose.Expert.load(expert)
        rows = phatgoose.load_task(spec, limit=run.row_limit)
        model = load_for(phatgoose.Pool([source]), base)
        before = source if target == expert else folders.existing_expert(target)
        signed = before or source
        if signed.signature is not None and not run.overwrite:
            if not made_so(model, source, signed, rows):
                raise folders.taken(target, "another signature or another expert")
            show.say(f"{target} has this very signature, finished before.")
        else:
            signed = make_signature(model, source, rows, config, work_folder=work)
            signed = folders.save_onto(target, signed, before, "signature", work)
        _summary(signed, target)


def _summary(expert: phatgoose.Expert, target: Path) -> None:
    from phatgoose.cli.common import folders
    from phatgoose.experts.data_signature import describe

    record = expert.provenance["signature"]
    rows = [("signature", f"{expert.name}: {describe(record)}")]
    if record["texts_cut"]:
        rows.append(("cut", f"{record['texts_cut']} of the texts are longer than the encoder reads"))
    show.facts([*rows, *folders.pool_next(target)])
