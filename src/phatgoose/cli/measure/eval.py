"""`phatgoose eval`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phatgoose.cli.common.options import (
    ROUTER_HELP,
    TASK_HELP,
    BackendOption,
    DeviceMemoryOption,
    DeviceOption,
    DtypeOption,
    PoolBaseOption,
    PoolOption,
)
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


def command(
    task: Annotated[
        list[str] | None, typer.Option("--task", help=f"{TASK_HELP} Give it again for more tasks.")
    ] = None,
    base: PoolBaseOption = None,
    pool: PoolOption = None,
    router: Annotated[
        list[str] | None,
        typer.Option("--router", help=f"{ROUTER_HELP} Give it again to compare several on the same rows."),
    ] = None,
    split: Annotated[
        Split | None, typer.Option("--split", help="Which split of the tasks; test if not given.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first rows of each task.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A JSON file for the scores, every prediction, and how they were made."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file in --out.")] = False,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            help="Instead of --task: tasks of lm-evaluation-harness, separated by commas, scored by it.",
        ),
    ] = None,
    harness_folder: Annotated[
        Path | None,
        typer.Option("--harness-folder", help="With --harness: a folder with further task files."),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--batch-tokens", min=1, help="Most tokens in one forward; lower it if memory runs out."
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    device_memory: DeviceMemoryOption = None,
) -> None:
    """Measure accuracy on tasks, of the base or of a pool under one router or several.

    Rows with choices are ranked by length-normalised log-likelihood, others must be matched exactly by a greedy answer.
    Intervals are 95 %, by bootstrap over rows.
    """
    from phatgoose.cli.common.loading import check_all, choose, load_for, load_pool
    from phatgoose.errors import EvaluationError, StorageError
    from phatgoose.evaluation.config import EvaluationConfig
    from phatgoose.models.attach.options import RouteOptions
    from phatgoose.tasks import load_task

    if (task is None) == (harness is None):
        raise EvaluationError("give either --task or --harness.")
    if harness is not None and (split is not None or batch_tokens is not None):
        raise EvaluationError(
            "--split and --batch-tokens are for --task: the harness has splits and batches of its own."
        )
    if harness is None and harness_folder is not None:
        raise EvaluationError("--harness-folder is for --harness: tasks have their data named in their spec.")
    if out is not None and out.exists() and not overwrite:
        raise StorageError(f"{out} exists: choose another file, or replace it with --overwrite.")
    experts = load_pool(pool)
    names = list(dict.fromkeys(router or [""]))
    options = RouteOptions(backend, device_memory=device_memory)
    chosen = [choose(name or None, experts, options) for name in names]
    choices = list({choice.text: choice for choice in chosen}.values())  # MERGED and merged are one
    tasks = [load_task(spec) for spec in dict.fromkeys(task or ())]
    model = load_for(experts, base, dtype, device)
    check_all(model, experts, choices)
    if harness is not None:
        from phatgoose.cli.measure.harness import measure_by_harness

        recipe = _recipe(model, experts, pool, tasks, backend, limit)
        measure_by_harness(model, experts, choices, harness.split(","), harness_folder, limit, recipe, out)
        return
    config = EvaluationConfig(batch_tokens=batch_tokens)
    recipe = _recipe(model, experts, pool, tasks, backend, limit)
    scores = _measure(model, experts, choices, tasks, (split or Split.test).value, limit, config, recipe, out)
    _show(scores)
    if out is not None:
        show.note(f"written: {out}")


def _measure(
    base: Base,
    pool: Pool | None,
    choices: list[Choice],
    tasks: list[Task],
    split: Any,
    limit: int | None,
    config: Any,
    recipe: dict[str, Any],
    out: Path | None,
) -> dict[str, Scores]:
    """Scores by router, written to `out` after each of them."""
    from dataclasses import asdict

    from phatgoose.cli.common.loading import attach, show_cache_use
    from phatgoose.evaluation.results import scores_to_json
    from phatgoose.evaluation.run import evaluate
    from phatgoose.files import write_json

    scores: dict[str, Scores] = {}
    results: dict[str, Any] = {}
    for number, choice in enumerate(choices, start=1):
        if len(choices) > 1:
            show.note(f"{choice.text} ({number} of {len(choices)})")
        attach(base, pool, choice)
        found = evaluate(base, tasks, split=split, limit=limit, config=config, progress=True)
        scores[choice.text] = found
        used = show_cache_use(base)
        results[choice.text] = {"router": choice.describe(), "scores": scores_to_json(found), **used}
        if out is not None:
            done = len(results) == len(choices)
            write_json(out, {**recipe, "config": asdict(config), "complete": done, "results": results})
    return scores


def _recipe(
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
