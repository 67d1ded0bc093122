"""`phatgoose eval --harness`: what lm-evaluation-harness says of the base or a pool under one router or several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phatgoose.cli.common.loading import Choice, attach, show_cache_use
from phatgoose.cli.measure import show
from phatgoose.evaluation.harness import run_harness
from phatgoose.experts.pool import Pool
from phatgoose.files import write_json
from phatgoose.models.base.base import Base


def measure_by_harness(
    base: Base,
    pool: Pool | None,
    choices: list[Choice],
    tasks: list[str],
    folder: Path | None,
    limit: int | None,
    recipe: dict[str, Any],
    out: Path | None,
) -> None:
    """Prints the harness's metrics for every router and writes them to `out`, with the rows' answers."""
    results: dict[str, Any] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for choice in choices:
        attach(base, pool, choice)
        found = run_harness(base, [t.strip() for t in tasks], include=folder, limit=limit)
        kept = {"lm_eval": version("lm_eval")} | {
            key: found[key]
            for key in ("results", "versions", "configs", "n-samples", "samples")
            if key in found
        }
        used = show_cache_use(base)
        metrics[choice.text] = found["results"]
        results[choice.text] = {"router": choice.describe(), "harness": _plain(kept), **used}
        if out is not None:
            write_json(out, {**recipe, "format": "phatgoose-harness", "results": results})
    show.table(("task", "metric", *metrics), table(metrics), numbers=list(metrics))
    if out is not None:
        show.note(f"written: {out}")


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of task, metric, and every router's number, from router → task → metric → value."""
    asked = dict.fromkeys(
        (task, metric)
        for tasks in found.values()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric not in ("alias", "sample_len")
    )
    return [
        (task, metric, *(_cell(tasks.get(task, {}).get(metric)) for tasks in found.values()))
        for task, metric in asked
    ]


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _plain(value: Any) -> Any:
    """What JSON can hold of the harness's results: functions and other objects by their names, infinities and NaN by theirs."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | bool | int) else str(value)
