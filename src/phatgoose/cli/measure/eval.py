"""`phatgoose eval`: accuracy on tasks, of the base or of a pool under one router or several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import phatgoose
from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import (
    AT_LEAST_1,
    ROUTER_HELP,
    TASK_HELP,
    BackendOptions,
    BaseOptions,
    PoolOption,
)
from phatgoose.cli.measure import show
from phatgoose.errors import EvaluationError, StorageError
from phatgoose.extras import installed_versions
from phatgoose.records import SplitName

if TYPE_CHECKING:
    from phatgoose.records import Scores


@dataclass(frozen=True)
class RowOptions(Options):
    """Which rows are measured, under which routers, and where the scores go."""

    task: Annotated[list[str] | None, typer.Option(help=f"{TASK_HELP} Give it again for more tasks.")] = None
    router: Annotated[
        list[str] | None,
        typer.Option(help=f"{ROUTER_HELP} Give it again to compare several on the same rows."),
    ] = None
    split: SplitName | None = None
    """Which split of the tasks; test if not given."""
    limit: Annotated[int | None, AT_LEAST_1] = None
    """Only the first rows of each task."""
    out: Path | None = None
    """A JSON file for the scores, every prediction, and how they were made."""
    overwrite: bool = False
    """Replace the file in --out."""
    harness: str | None = None
    """Instead of --task: tasks of lm-evaluation-harness, separated by commas, scored by it."""
    harness_folder: Path | None = None
    """With --harness: a folder with further task files."""
    batch_tokens: Annotated[int | None, AT_LEAST_1] = None
    """Most tokens in one forward pass; lower it if memory runs out."""

    def check(self) -> None:
        """Refuses options that don't go together."""
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
    from phatgoose.cli.common.loading import attach, load_with_choices, show_cache_use
    from phatgoose.files import write_json

    tasks = [phatgoose.load_task(spec) for spec in dict.fromkeys(rows.task or ())]
    routers = list(dict.fromkeys(rows.router or [""]))
    model, experts, chosen = load_with_choices(pool, routers, base, backend.route_options)
    choices = {choice.text: choice for choice in chosen}  # MERGED and merged are one
    for choice in choices.values():  # a refusal of the last must not come after hours of work with the first
        attach(model, experts, choice)
    config = phatgoose.EvaluationConfig(batch_tokens=rows.batch_tokens)
    record = _record(model, experts, pool, tasks, backend.backend, rows.limit)
    by_harness = rows.harness is not None
    record |= {"format": "phatgoose-harness"} if by_harness else {"config": asdict(config)}
    measured: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for number, (name, choice) in enumerate(choices.items(), start=1):
        if len(choices) > 1:
            show.note(f"{name} ({number} of {len(choices)})")
        attach(model, experts, choice)
        if by_harness:
            measured[name], found = _harness_scores(model, rows)
        else:
            measured[name], found = _scores(model, tasks, rows, config)
        results[name] = {"router": choice.describe(), **found, **show_cache_use(model)}
        if rows.out is not None:
            write_json(rows.out, {**record, "complete": number == len(choices), "results": results})
    if by_harness:
        show.table(("task", "metric", *measured), table(measured), numbers=list(measured))
    else:
        _show(measured)
    if rows.out is not None:
        show.note(f"written: {rows.out}")


def _scores(
    base: phatgoose.Base,
    tasks: Sequence[phatgoose.Task],
    rows: RowOptions,
    config: phatgoose.EvaluationConfig,
) -> tuple[Scores, dict[str, Any]]:
    """(the scores of the base as it is routed now, what is kept of them)."""
    from phatgoose.evaluation.results import scores_to_json

    split = rows.split or "test"
    scores = phatgoose.evaluate(base, tasks, split=split, limit=rows.limit, config=config, progress=True)
    return scores, {"scores": scores_to_json(scores)}


def _harness_scores(base: phatgoose.Base, rows: RowOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same by lm-evaluation-harness: (metrics by task, the parts of its results that are kept)."""
    from phatgoose.evaluation.harness import run_harness

    names = [name.strip() for name in str(rows.harness).split(",")]
    found = run_harness(base, names, include=rows.harness_folder, limit=rows.limit)
    kept = ("results", "versions", "configs", "n-samples", "samples")
    own = {"lm_eval": version("lm_eval")} | {k: found[k] for k in kept if k in found}
    return found["results"], {"harness": _plain(own)}


def _record(
    base: phatgoose.Base,
    pool: phatgoose.Pool | None,
    folder: Path | None,
    tasks: Sequence[phatgoose.Task],
    backend: str,
    limit: int | None,
) -> dict[str, Any]:
    """How the scores were made."""
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
        (one.task, one.metric, str(one.rows), *(_interval(s.tasks[i]) for s in scores.values()))
        for i, one in enumerate(first.tasks)
    ]
    if len(first.tasks) > 1:
        rows.append(("mean over tasks", "", "", *(_interval(s) for s in scores.values())))
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


def _interval(score: Any) -> str:
    return f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]"


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of task, metric, and every router's number, from router → task → metric → value of the harness."""
    asked = dict.fromkeys(
        (task, metric)
        for tasks in found.values()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric not in ("alias", "sample_len")
    )
    return [
        (task, metric, *(_number(tasks.get(task, {}).get(metric)) for tasks in found.values()))
        for task, metric in asked
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _plain(value: Any) -> Any:
    """The harness's results as JSON can hold them: functions and other objects, infinities and NaN as text."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda text: str(float(text)))
