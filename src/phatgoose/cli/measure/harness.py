"""`phatgoose eval --harness`: tasks that lm-evaluation-harness scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phatgoose.evaluation.harness import run_harness
from phatgoose.models.base.base import Base


def measure_by_harness(
    base: Base, tasks: list[str], folder: Path | None, limit: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics by task, the parts of its results that are kept, with the rows' answers) for the base as it is
    routed now."""
    found = run_harness(base, tasks, include=folder, limit=limit)
    kept = ("results", "versions", "configs", "n-samples", "samples")
    return found["results"], _plain(
        {"lm_eval": version("lm_eval")} | {k: found[k] for k in kept if k in found}
    )


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
    """The harness's results as JSON can hold them: functions and other objects, infinities and NaN as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | bool | int) else str(value)
