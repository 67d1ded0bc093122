"""From the score files of all systems to results.json: means, paired comparisons, the share of the oracle's gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.statistics import holm, paired_difference, paired_p_value, suite_interval
from phatgoose.records import TaskScore
from phatgoose.workflows import show
from phatgoose.workflows.experiment_recipe import ExperimentRecipe
from phatgoose.workflows.measured import Measurements, code_version
from phatgoose.workflows.summary import RESAMPLES, hits, raw_rows, recovered
from phatgoose.workflows.systems import BASE, MAIN

FORMAT, VERSION = "phatgoose-experiment", 1

Files = Mapping[str, Mapping[str, Mapping[str, str]]]
"""System → suite → task → file of its score."""
Table = dict[str, dict[str, TaskScore]]


def results_of(
    recipe: ExperimentRecipe,
    out: Path,
    tasks: Mapping[str, Mapping[str, Any]],
    left_out: Mapping[str, Mapping[str, str]],
    experts: Sequence[Mapping[str, Any]],
    files: Files,
    chosen: Mapping[str, Any],
    contamination: Mapping[str, Any],
    failed: Mapping[str, str],
    *,
    together: Mapping[str, Any] | None = None,
    seconds: float,
) -> dict[str, Any]:
    """What results.json holds. Nothing in it but "made" and the experts' seconds differs between two runs of a recipe."""
    suites = {}
    for name, found in tasks.items():
        table = _table(out, files, name)
        suites[name] = suite_results(table, list(found)) | {
            "tasks": found,
            "left_out": dict(left_out.get(name, {})),
            "contamination": contamination.get(name, {}),
        }
    return {
        "format": FORMAT,
        "version": VERSION,
        "made": show.made(seconds) | {"code": code_version(), "threads": torch.get_num_threads()},
        "recipe": recipe.to_json(),
        "evaluation": asdict(EvaluationConfig()),
        "experts": [dict(e) for e in experts],
        "multitask": None if together is None else dict(together),
        "suites": suites,
        "chosen": chosen,
        "complete": not failed,
        "failed": dict(failed),
    }


def suite_results(table: Table, tasks: Sequence[str]) -> dict[str, Any]:
    """Means, intervals and comparisons on the tasks that every system has been measured on.

    A system without a single score is left out, so that it doesn't take all tasks with it.
    """
    table = {system: row for system, row in table.items() if row}
    common = [t for t in tasks if table and all(t in row for row in table.values())]
    systems = {}
    for system, row in table.items():
        scores = {
            t: {"mean": s.mean, "low": s.low, "high": s.high, "rows": s.rows, "raw_rows": s.raw_rows, "metric": s.metric,
                "cut": s.truncated_rows}
            for t, s in row.items()
        }  # fmt: skip
        systems[system] = {"tasks": scores, **(_mean(row, common) if common else {})}
    comparisons = {
        other: against(table, common, other) for other in (BASE, MAIN) if other in table and common
    }
    shares = {}
    if common and "oracle" in table and BASE in table:
        for system in table:
            if system not in (BASE, "oracle"):
                three = {"system": table[system], "base": table[BASE], "oracle": table["oracle"]}
                shares[system] = recovered(three, common, "system")
    return {"common_tasks": common, "systems": systems, "against": comparisons, "oracle_gain_share": shares}


def against(table: Table, tasks: Sequence[str], other: str) -> dict[str, Any]:
    """Every system minus `other` on the same rows: mean, 95 % interval, p-value, and p adjusted by Holm over the systems."""
    systems = [s for s in table if s != other]
    theirs, groups = hits(table[other], tasks), raw_rows(table[other], tasks)
    found, values = {}, []
    for system in systems:
        ours = hits(table[system], tasks)
        mean, low, high = paired_difference(ours, theirs, groups=groups, resamples=RESAMPLES)
        values.append(paired_p_value(ours, theirs, groups=groups, resamples=RESAMPLES))
        found[system] = {"difference": mean, "low": low, "high": high, "p": values[-1]}
    for system, adjusted in zip(systems, holm(values), strict=True):
        found[system]["p_holm"] = adjusted
    return found


def _mean(row: Mapping[str, TaskScore], tasks: Sequence[str]) -> dict[str, float]:
    values = hits(row, tasks)
    low, high = suite_interval(values, groups=raw_rows(row, tasks), resamples=RESAMPLES)
    return {"mean": float(np.mean([np.mean(v) for v in values])), "low": low, "high": high}


def _table(out: Path, files: Files, suite: str) -> Table:
    return {
        system: {t: Measurements.read(out / "scores" / f) for t, f in found.get(suite, {}).items()}
        for system, found in files.items()
    }
