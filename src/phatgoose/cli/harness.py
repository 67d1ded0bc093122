"""`phatgoose eval --harness`: what lm-evaluation-harness says of the base or a pool under one router or several."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phatgoose.cli import show
from phatgoose.cli.loading import Choice, attach, show_cache_use
from phatgoose.evaluation.harness import run_harness
from phatgoose.experts.pool import Pool
from phatgoose.files import write_json
from phatgoose.models.base import Base


def measure_by_harness(
    base: Base,
    pool: Pool | None,
    choices: list[Choice],
    tasks: list[str],
    folder: Path | None,
    limit: int | None,
    backend: str,
    recipe: dict[str, Any],
    out: Path | None,
) -> None:
    """Prints the harness's metrics for every router and writes them to `out`, with the rows' answers."""
    results: dict[str, Any] = {}
    for choice in choices:
        attach(base, pool, choice, backend)
        found = run_harness(base, [t.strip() for t in tasks], include=folder, limit=limit)
        kept = {"lm_eval": version("lm_eval")} | {
            key: found[key]
            for key in ("results", "versions", "configs", "n-samples", "samples")
            if key in found
        }
        used = show_cache_use(base)
        results[choice.text] = {"router": choice.settings, "harness": _plain(kept), **used}
        if out is not None:
            write_json(out, {**recipe, "format": "phatgoose-harness", "results": results})
    names = list(results)
    rows = [
        (
            task,
            metric,
            *(_cell(results[name]["harness"]["results"].get(task, {}).get(metric)) for name in names),
        )
        for task, metrics in results[names[0]]["harness"]["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric not in ("alias", "sample_len")
    ]
    show.table(("task", "metric", *names), rows, numbers=names)
    if out is not None:
        show.note(f"written: {out}")


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _plain(value: Any) -> Any:
    """What JSON can hold of the harness's results: functions and other objects by their names."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)
