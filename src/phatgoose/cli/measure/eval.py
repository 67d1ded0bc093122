"""`phatgoose eval`: accuracy on tasks, of the base or of a pool under one router or several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import ROUTER_HELP, TASK_HELP, BackendOptions, BaseOptions, PoolOption
from phatgoose.cli.measure import show

if TYPE_CHECKING:
    from phatgoose.cli.common.loading import Choice
    from phatgoose.experts.pool import Pool
    from phatgoose.models.base.base import Base
    from phatgoose.records import Scores, Task


class Split(StrEnum):
    """The splits of a task, as typer wants them."""

    train = "train"
    validation = "validation"
    test = "test"


@dataclass(frozen=True)
class RowOptions:
    """Which rows are measured, under which routers, and where the scores go."""

    task: Annotated[list[str] | None, typer.Option(help=f"{TASK_HELP} Give it again for more tasks.")] = None
    router: Annotated[
        list[str] | None,
        typer.Option(help=f"{ROUTER_HELP} Give it again to compare several on the same rows."),
    ] = None
    split: Annotated[Split | None, typer.Option(help="Which split of the tasks; test if not given.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each task.")] = None
    out: Annotated[
        Path | None,
        typer.Option(help="A JSON file for the scores, every prediction, and how they were made."),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file in --out.")] = False
    harness: Annotated[
        str | None,
        typer.Option(
            help="Instead of --task: tasks of lm-evaluation-harness, separated by commas, scored by it."
        ),
    ] = None
    harness_folder: Annotated[
        Path | None, typer.Option(help="With --harness: a folder with further task files.")
    ] = None
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens in one forward pass; lower it if memory runs out.")
    ] = None

    def check(self) -> None:
        """Refuses options that don't go together."""
        from phatgoose.errors import EvaluationError, StorageError

        if (self.task is None) == (self.harness is None):
            raise EvaluationError("give either --task or --harness.")
        if self.harness is not None and (self.split is not None or self.batch_tokens is not None):
            raise EvaluationError(
                "--split and --batch-tokens are for --task: the harness has splits and batches of its own."
            )
        if self.harness is None and self.harness_folder is not None:
            raise EvaluationError(
                "--harness-folder is for --harness: tasks have their data named in their spec."
            )
        if self.out is not None and self.out.exists() and not self.overwrite:
            raise StorageError(f"{self.out} exists: choose another file, or replace it with --overwrite.")


@expand_options
def command(rows: RowOptions, base: BaseOptions, backend: BackendOptions, pool: PoolOption = None) -> None:
    """Measure accuracy on tasks, of the base or of a pool under one router or several.

    Rows with choices are ranked by length-normalised log-likelihood, others must be matched exactly by a greedy answer.
    Intervals are 95 %, by bootstrap over rows.
    """
    rows.check()
    from phatgoose.cli.common.loading import check_all, choose, load_for, load_pool
    from phatgoose.tasks import load_task

    experts = load_pool(pool)
    chosen = [
        choose(name or None, experts, backend.route_options) for name in dict.fromkeys(rows.router or [""])
    ]
    choices = list({choice.text: choice for choice in chosen}.values())  # MERGED and merged are one
    tasks = [load_task(spec) for spec in dict.fromkeys(rows.task or ())]
    model = load_for(experts, base)
    check_all(model, experts, choices)
    record = _record(model, experts, pool, tasks, backend.backend, rows.limit)
    measure, show_all = _by_tasks(rows, tasks, record) if rows.harness is None else _by_harness(rows, record)
    results: dict[str, Any] = {}
    for choice in choices:
        if len(choices) > 1:
            show.note(f"{choice.text} ({len(results) + 1} of {len(choices)})")
        results[choice.text] = _measured(model, experts, choice, measure)
        if rows.out is not None:
            from phatgoose.files import write_json

            write_json(rows.out, {**record, "complete": len(results) == len(choices), "results": results})
    show_all()
    if rows.out is not None:
        show.note(f"written: {rows.out}")


def _measured(
    base: Base, pool: Pool | None, choice: Choice, measure: Callable[[Base, str], dict[str, Any]]
) -> dict[str, Any]:
    from phatgoose.cli.common.loading import attach, show_cache_use

    attach(base, pool, choice)
    found = measure(base, choice.text)
    return {"router": choice.describe(), **found, **show_cache_use(base)}


def _by_tasks(
    options: RowOptions, tasks: list[Task], record: dict[str, Any]
) -> tuple[Callable[[Base, str], dict[str, Any]], Callable[[], None]]:
    """(what measures one router, what shows all)."""
    from dataclasses import asdict

    from phatgoose.evaluation.config import EvaluationConfig
    from phatgoose.evaluation.results import scores_to_json
    from phatgoose.evaluation.run import evaluate

    config, scores = EvaluationConfig(batch_tokens=options.batch_tokens), {}
    split: Any = (options.split or Split.test).value
    record |= {"config": asdict(config)}

    def measure(base: Base, router: str) -> dict[str, Any]:
        scores[router] = evaluate(base, tasks, split=split, limit=options.limit, config=config, progress=True)
        return {"scores": scores_to_json(scores[router])}

    return measure, lambda: _show(scores)


def _by_harness(
    options: RowOptions, record: dict[str, Any]
) -> tuple[Callable[[Base, str], dict[str, Any]], Callable[[], None]]:
    """The same by lm-evaluation-harness."""
    from phatgoose.cli.measure.harness import measure_by_harness, table

    names = [name.strip() for name in str(options.harness).split(",")]
    record |= {"format": "phatgoose-harness"}
    metrics: dict[str, Any] = {}

    def measure(base: Base, router: str) -> dict[str, Any]:
        metrics[router], found = measure_by_harness(base, names, options.harness_folder, options.limit)
        return {"harness": found}

    return measure, lambda: show.table(("task", "metric", *metrics), table(metrics), numbers=list(metrics))


def _record(
    base: Base, pool: Pool | None, folder: Path | None, tasks: list[Task], backend: str, limit: int | None
) -> dict[str, Any]:
    """How the scores were made."""
    from phatgoose.extras import installed_versions

    return {
        "format": "phatgoose-eval",
        "version": 1,
        "base": {
            "spec": base.spec,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "notes": list(base.notes),
        },
        "pool": None if pool is None else {"folder": str(folder), "experts": list(pool.names)},
        "backend": backend,
        "device": str(base.device),
        "limit": limit,
        "tasks": {task.name: {"source": task.source, "hash": task.hash} for task in tasks},
        "versions": installed_versions("phatgoose", "torch", "transformers", "peft"),
    }


def _show(scores: dict[str, Scores]) -> None:
    first = next(iter(scores.values()))
    columns = ("task", "metric", "rows", *scores)
    rows = [
        (one.task, one.metric, str(one.rows), *(_cell(s.tasks[i]) for s in scores.values()))
        for i, one in enumerate(first.tasks)
    ]
    if len(first.tasks) > 1:
        rows.append(("mean over tasks", "", "", *(_cell(s) for s in scores.values())))
    show.table(columns, rows, numbers=("rows",))
    _show_differences(scores)
    for one in first.tasks:
        if one.truncated_rows:
            show.warn(
                f"{one.task}: {one.truncated_rows} prompts were cut at the left to fit the model's context."
            )


def _show_differences(scores: dict[str, Scores]) -> None:
    """Each router against the first, paired by rows."""
    from phatgoose.evaluation.statistics import paired_difference

    values = {
        name: [[p.points for p in task.predictions] for task in found.tasks] for name, found in scores.items()
    }
    (first, base), *others = values.items()
    groups = [task.groups for task in scores[first].tasks]
    for name, other in others:
        mean, low, high = paired_difference(other, base, groups=groups)
        show.say(f"{name} − {first}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], paired by rows")


def _cell(score: Any) -> str:
    return f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]"
