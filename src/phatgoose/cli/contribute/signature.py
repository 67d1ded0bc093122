"""`phatgoose signature`: the data signature of an expert."""

from __future__ import annotations

from pathlib import Path

import phatgoose
from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import (
    ExpertArgument,
    ExpertBaseOptions,
    ExpertOutOption,
    RunOptions,
    TaskOption,
)
from phatgoose.cli.measure import show
from phatgoose.training.config import SignatureConfig


@expand_options
def command(
    expert: ExpertArgument,
    task: TaskOption,
    base: ExpertBaseOptions,
    run: RunOptions,
    config: SignatureConfig,
    out: ExpertOutOption = None,
) -> None:
    """Make an expert's data signature: what its own training rows look like, for routers that need no gates.

    Mean activations at every adapted module (average-activation), mean prompts (gander:means=true), and embeddings of
    training prompts (retrieval, centroid, soft-centroid). Nothing is trained. Use the rows the expert was trained on.
    If it is stopped, the same command continues.
    """
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load_for
    from phatgoose.models.base.sentence_encoder import load_encoder
    from phatgoose.training.signature import make_signature, signature_key

    target = out or expert
    folders.check_target(target, keeps_card=target == expert)
    work = run.work_folder(target)
    with folders.only_run(target, "signature", work):
        source = phatgoose.Expert.load(expert)
        rows = phatgoose.load_task(task, limit=run.row_limit)
        model = load_for(phatgoose.Pool([source]), base)
        encoder = load_encoder(config.encoder) if config.texts else None
        before = source if target == expert else folders.existing_expert(target)
        signed = before or source
        if signed.signature is not None and not run.overwrite:
            made = signed.provenance.get("signature", {})
            key = signature_key(model, source, rows, config, encoder)
            if not isinstance(made, dict) or made.get("key") != key:
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
