"""From the score files of all systems to results.json: means, paired comparisons, the share of the oracle's gain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.statistics import holm, resampled, two_sided_p
from phatgoose.files import read_json
from phatgoose.records import TaskScore
from phatgoose.workflows import show
from phatgoose.workflows.experiment.page import FORMAT
from phatgoose.workflows.experiment.recipe import ExperimentRecipe, local_name
from phatgoose.workflows.experiment.scores import Measurements
from phatgoose.workflows.experiment.systems import BASE, MAIN, ORACLE
from phatgoose.workflows.summary import RESAMPLES, Drawn, interval, raw_rows, share_of_gain

VERSION = 1

Files = Mapping[str, Mapping[str, Mapping[str, str]]]
"""System → suite → task → file of its score."""
Table = dict[str, dict[str, TaskScore]]

PACKAGES = (
    "accelerate",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "jinja2",
    "rouge-score",
    "huggingface_hub",
)
ALIKE = ("code", "torch", "transformers", "dtype", "device", "backend", "threads")
"""What all scores of a comparison should have in common; "base" has one value more for each further model."""

UNLIKE = "its rows weren't the same in all steps: its data changed meanwhile, or isn't the same everywhere"


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
    """What results.json holds. "made" and seconds apart, two runs of a recipe in which nothing fails hold the same on as many threads."""
    suites: dict[str, Any] = {}
    unlike: dict[str, str] = {}
    for name, found in tasks.items():
        table = _table(out, files, name)
        compared = suite_results(table, {task: info["hash"] for task, info in found.items()})
        changed = dict.fromkeys(compared.pop("unlike"), UNLIKE)
        unlike |= {f"{name}: {task}": why for task, why in changed.items()}
        suites[name] = compared | {
            "tasks": found,
            "left_out": {**left_out.get(name, {}), **changed},
            "contamination": contamination["suites"].get(name, {}),
        }
    failed, facts = {**failed, **unlike}, _facts(out, files)
    return {
        "format": FORMAT,
        "version": VERSION,
        "made": show.made(seconds) | _versions() | {"measuring_seconds": _measuring(files, facts)},
        "measured": _measured(facts),
        "recipe": recipe.without_paths(),
        "evaluation": asdict(EvaluationConfig()),
        "resamples": RESAMPLES,
        "experts": [dict(e) for e in experts],
        "multitask": None if together is None else dict(together),
        "suites": suites,
        "chosen": chosen,
        "training_rows": {k: contamination[k] for k in ("read", "unread")},
        "complete": not failed,
        "failed": failed,
    }


def _versions() -> dict[str, str | None]:
    """Of the packages that data and scores hang on; None: it isn't installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _facts(out: Path, files: Files) -> dict[str, dict[str, Any]]:
    """File of a score → what it was computed with, and how: each read once."""
    facts = {}
    for name in dict.fromkeys(
        f for suites in files.values() for tasks in suites.values() for f in tasks.values()
    ):
        data = read_json(out / "scores" / name, EvaluationError)
        facts[name] = {**data["key"], **data.get("made", {})}
    return facts


def _measuring(files: Files, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """System → suite → seconds that measuring took, in whichever runs it was done; None where an older file doesn't say.

    A file that serves two systems (the same expert alone) counts for both.
    """

    def seconds(names: Iterable[str]) -> float | None:
        found: list[Any] = [facts[name].get("seconds") for name in names]
        return None if None in found else round(sum(found), 1)

    return {
        system: {suite: seconds(tasks.values()) for suite, tasks in suites.items()}
        for system, suites in files.items()
    }


def _measured(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What the scores were computed with, as their files say; several values of one thing mean that they weren't all computed alike."""
    found: dict[str, dict[str, Any]] = {name: {} for name in (*ALIKE, "base")}
    for one in facts.values():
        base = one["base"]
        said = {**one, "base": {**base, "spec": local_name(str(base.get("spec")))}}
        for name in found:
            if name in said:
                found[name][json.dumps(said[name], sort_keys=True)] = said[name]
    return {name: list(values.values()) for name, values in found.items()}


def suite_results(table: Table, tasks: Mapping[str, str]) -> dict[str, Any]:
    """Means, intervals and comparisons on the tasks that every system has been measured on; "unlike" are those of different rows.

    A system without a single score is left out, so that it doesn't take all tasks with it.

    Args:
        tasks: by name, the hash that each had when it was checked, and experts were chosen on it.
    """
    table = {system: row for system, row in table.items() if row}
    common = [t for t in tasks if table and all(t in row for row in table.values())]
    measured = {t: {(row[t].task_hash, row[t].rows) for row in table.values()} for t in common}
    unlike = [t for t in common if len(measured[t]) > 1 or {h for h, _ in measured[t]} != {tasks[t]}]
    common = [t for t in common if t not in unlike]
    systems: dict[str, dict[str, Any]] = {}
    for system, row in table.items():
        scores = {
            t: {"mean": s.mean, "low": s.low, "high": s.high, "rows": s.rows, "raw_rows": s.raw_rows, "metric": s.metric,
                "cut": s.truncated_rows}
            for t, s in row.items()
        }  # fmt: skip
        systems[system] = {"tasks": scores}
    results = {
        "common_tasks": common, "systems": systems, "against": {}, "oracle_gain_share": {}, "unlike": unlike,
    }  # fmt: skip
    if not common:
        return results
    points = [np.array([[p.points for p in row[t].predictions] for row in table.values()]) for t in common]
    groups = raw_rows(next(iter(table.values())), common)
    drawn = dict(zip(table, resampled(points, groups=groups, resamples=RESAMPLES), strict=True))
    means = dict(zip(table, np.mean([p.mean(axis=1) for p in points], axis=0).tolist(), strict=True))
    for system in table:
        systems[system] |= {"mean": means[system]} | interval(drawn[system])
    results["against"] = {o: against(means, drawn, o) for o in (BASE, MAIN) if o in table}
    if ORACLE in table and BASE in table:
        results["oracle_gain_share"] = {
            s: share_of_gain(means, drawn, s) for s in table if s not in (BASE, ORACLE)
        }
    return results


def against(means: Mapping[str, float], drawn: Drawn, other: str) -> dict[str, Any]:
    """Every system minus `other` on the same rows: mean, 95 % interval, p-value, and p adjusted by Holm over the systems."""
    differences = {s: drawn[s] - drawn[other] for s in drawn if s != other}
    values = [two_sided_p(d) for d in differences.values()]
    return {
        system: {"difference": means[system] - means[other], **interval(found), "p": p, "p_holm": adjusted}
        for (system, found), p, adjusted in zip(differences.items(), values, holm(values), strict=True)
    }


def _table(out: Path, files: Files, suite: str) -> Table:
    return {
        system: {t: Measurements.read(out / "scores" / f) for t, f in found.get(suite, {}).items()}
        for system, found in files.items()
    }
