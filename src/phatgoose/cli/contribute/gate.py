"""`phatgoose gate`: the gates of an expert, trained on a task or on texts that the base writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    WritingOptions,
)
from phatgoose.cli.measure import show
from phatgoose.errors import ExpertError, TaskError
from phatgoose.files import sha256_json
from phatgoose.training.config import GateConfig, WritingConfig


@expand_options
def command(
    base: ExpertBaseOptions,
    run: RunOptions,
    whole: WholePoolOptions,
    writing: WritingOptions,
    config: GateConfig,
    experts: ExpertsArgument = None,
    task: TasksOption = None,
    out: ExpertOutOption = None,
) -> None:
    """Train an expert's gates: for each module one vector that says which tokens the expert should act on.

    Base and expert stay as they are. Use the rows that the expert was trained on. If they aren't available, use
    --generated (texts are sampled with --seed). With --pool, the experts of a pool get theirs one after the other. If
    it is stopped, the same command continues.
    """
    if whole.pool is not None:
        _over_pool(whole, experts, task, base, run, writing, config, out)
        return
    from phatgoose.cli.common import folders
    from phatgoose.cli.common.loading import load_for
    from phatgoose.cli.common.whole_pool import one_expert, one_task
    from phatgoose.experts.files.safetensors_file import all_identical

    expert, spec = one_expert(experts), one_task(task)
    target = out or expert
    folders.check_target(target, keeps_card=target == expert)
    work, taken = run.work_folder(target), folders.taken(target, "other gates or another expert")
    with folders.only_run(target, "gate", work):
        source = phatgoose.Expert.load(expert)
        before = source if target == expert else folders.existing_expert(target)
        gated = before or source
        if not run.overwrite and not all_identical(source.tensors, gated.tensors):
            raise taken
        texts = _wanted_texts(writing, run, spec is not None, config.seed)
        rows = None if spec is None else phatgoose.load_task(spec, limit=run.row_limit)
        # Checked before the base is loaded, which takes long, as far as the record tells; then in full.
        finished = gated.gates is not None and not run.overwrite
        if finished and not _made_so(gated, None, rows, texts, config):
            raise taken
        model = load_for(phatgoose.Pool([source]), base)
        if finished and not _made_so(gated, model, rows, texts, config):
            raise taken
        if finished:
            show.say(f"{target} has these very gates, finished before.")
        else:
            gated = _trained(model, source, rows, texts, config, work)
            if not folders.is_main_process():
                return
            gated = folders.save_onto(target, gated, before, "gate", work)
        _summary(gated, target)


def _over_pool(
    whole: WholePoolOptions,
    names: list[str] | None,
    tasks: list[str] | None,
    base: ExpertBaseOptions,
    run: RunOptions,
    writing: WritingOptions,
    config: GateConfig,
    out: Path | None,
) -> None:
    """The gates of a pool's experts."""
    from phatgoose.cli.common.whole_pool import over_pool

    if out is not None:
        raise typer.BadParameter("gates of a pool's experts are written into the pool.", param_hint="--out")
    texts = _wanted_texts(writing, run, bool(tasks) or not writing.generated, config.seed)

    def make(
        model: phatgoose.Base, expert: phatgoose.Expert, rows: phatgoose.Task | None, work: Path
    ) -> phatgoose.Expert | None:
        if expert.gates is None or run.overwrite:
            return _trained(model, expert, rows, texts, config, work)
        if _made_so(expert, model, rows, texts, config):
            return None
        raise ExpertError(
            "it has other gates already: replace them with --overwrite, or leave it out with --missing."
        )

    over_pool(whole, names, tasks, "gate", run, base, make, without_task=texts is not None)


def _made_so(
    expert: phatgoose.Expert,
    base: phatgoose.Base | None,
    rows: phatgoose.Task | None,
    texts: WantedTexts | None,
    config: GateConfig,
) -> bool:
    """Whether an expert's gates were made so; without a base, as far as the record tells."""
    from phatgoose.cli.common import folders

    record = expert.provenance.get("gate", {})
    return (texts is None or texts.made(record)) and folders.made_so(record, base, rows, config)


def _trained(
    base: phatgoose.Base,
    expert: phatgoose.Expert,
    rows: phatgoose.Task | None,
    texts: WantedTexts | None,
    config: GateConfig,
    work: Path,
) -> phatgoose.Expert:
    from phatgoose.training.gate import train_gate

    rows = texts.task(base, expert, work) if texts else rows
    assert rows is not None
    return train_gate(base, expert, rows, config, work_folder=work)


def _summary(expert: phatgoose.Expert, target: Path) -> None:
    from phatgoose.cli.common import folders

    record = expert.provenance["gate"]
    rows = [
        ("gates", f"{expert.name}: {len(expert.gates or {})} modules, {record['parameters']:,} parameters"),
        ("validation loss", folders.validation(record)),
    ]
    if share := record.get("cost_share", {}).get("tokens"):
        rows.append(("cost", f"{share:.0%} as many tokens as the expert was trained on"))
    show.facts([*rows, *folders.pool_next(target)])


@dataclass(frozen=True)
class WantedTexts:
    """Texts that the base is to write, in place of a task."""

    config: WritingConfig
    prompts: tuple[str, ...]

    def made(self, record: Mapping[str, Any]) -> bool:
        """Whether a gate's record says that it was trained on such texts."""
        try:
            source = record["task"]["source"]
            prompts = (source["prompts"] or {}).get("sha256")
            same = source["source"] == "generated" and source["config"] == asdict(self.config)
            return bool(same and prompts == (sha256_json(list(self.prompts)) if self.prompts else None))
        except (KeyError, TypeError, AttributeError):  # somebody else's record
            return False

    def task(self, base: phatgoose.Base, expert: phatgoose.Expert, work: Path) -> phatgoose.Task:
        """The texts as a task, with what became of them on standard error."""
        from phatgoose.training.generated import write_task

        task = write_task(base, expert, self.config, prompts=self.prompts, work_folder=work)
        counts = task.source["texts"]
        show.note(
            "texts: "
            + ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items() if number)
        )
        return task


def _wanted_texts(options: WritingOptions, run: RunOptions, by_task: bool, seed: int) -> WantedTexts | None:
    """The texts that the options ask for; None if it is a task that is trained on."""
    if options.generated == by_task:
        raise typer.BadParameter("give the expert's --task, or --generated if its data are not at hand.")
    config = WritingConfig(
        rows=options.texts, max_new_tokens=options.text_tokens, temperature=options.temperature, seed=seed
    )
    if options.generated:
        if run.limit_train is not None:
            raise typer.BadParameter("--limit-train is for a task's rows; with --generated, say --texts.")
        return WantedTexts(config, () if options.prompts is None else lines(options.prompts))
    if options.prompts is not None or config != WritingConfig(seed=seed):
        raise typer.BadParameter("--prompts, --texts, --text-tokens and --temperature go with --generated.")
    return None


def lines(file: Path) -> tuple[str, ...]:
    """The prompts in a file, one per line; a line break inside a prompt is written \\n there."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise TaskError(f"{file} can't be read as text: {cause}.") from cause
    found = tuple(line.strip().replace("\\n", "\n") for line in text.splitlines() if line.strip())
    if not found:
        raise TaskError(f"{file} has no prompts: write one per line.")
    return found
