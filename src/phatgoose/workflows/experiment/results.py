"""From score files to results.json: means, comparisons, shares of the oracle's gain."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.statistics import holm, resampled, two_sided_p
from phatgoose.extras import installed_versions
from phatgoose.files import read_json
from phatgoose.records import TaskScore
from phatgoose.workflows.experiment.hits import hits
from phatgoose.workflows.experiment.measures.compare import by_measure
from phatgoose.workflows.experiment.measures.values import Answers, interval
from phatgoose.workflows.experiment.page import FORMAT, page_names
from phatgoose.workflows.experiment.recipe import IN_POOL, ExperimentRecipe, local_name
from phatgoose.workflows.experiment.scores import EVALUATION, RESAMPLES, ScoreCache
from phatgoose.workflows.experiment.systems import BASE, MAIN, ORACLE, OWN, SISTER

VERSION = 1

Files = Mapping[str, Mapping[str, Mapping[str, str]]]
"""System → suite → task → file of its score."""
Table = Mapping[str, Mapping[str, TaskScore]]
"""System → task → its score."""
Resampled = Mapping[str, NDArray[np.float64]]
"""System → its mean over tasks in each resample, [resamples]. All systems see the same resampled rows."""

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
"""Packages that data and scores depend on, beside those that every record names."""
ALIKE = ("code", "torch", "transformers", "dtype", "device", "backend", "threads")
"""What all scores of a comparison should have in common; "base" has one more value for each further model."""

UNLIKE = "its rows weren't the same in all steps: its data changed meanwhile, or isn't the same everywhere"


@dataclass
class Findings:
    """What the steps of a run find out, stage by stage."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Suite → task → what is known of it."""
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    """Suite → task → the right answers of its measured rows, if the recipe asks for measures that need them."""
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    """Suite → task → why it is not measured."""
    experts: list[dict[str, Any]] = field(default_factory=list)
    """The record of each expert, in the pool's order."""
    admission: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Trained expert → what it gains over the base on validation rows of its task, if the recipe admits by that."""
    admitted_tasks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Suite → task → what its own expert and its sisters gain on validation rows, and whether it is measured
    (`admission.verdict`), if the recipe admits tasks by that."""
    multitask: dict[str, Any] | None = None
    """The record of the one expert trained on all data, if it was asked for and could be trained."""
    files: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    """System → suite → task → file of its score."""
    chosen: dict[str, dict[str, dict[str, str | None]]] = field(default_factory=dict)
    """System → suite → task → the expert that acts; None: none, by choice."""
    contamination: dict[str, Any] = field(default_factory=dict)
    """{"suites": suite → task → rows that share text with training rows, "read" and "unread": experts whose rows were
    compared or not}."""
    traced: dict[str, Any] = field(default_factory=dict)
    """"shares" and "layers" by task, if the pool was traced."""
    failed: dict[str, str] = field(default_factory=dict)
    """What failed → why."""


def results_of(recipe: ExperimentRecipe, out: Path, found: Findings, seconds: float) -> dict[str, Any]:
    """What results.json holds.

    Two runs of a recipe in which nothing fails hold the same, apart from "made" and seconds, if they use as many
    threads.
    """
    suites: dict[str, Any] = {}
    for name, tasks in found.tasks.items():
        table = {
            system: {t: ScoreCache.read(out / "scores" / f) for t, f in files.get(name, {}).items()}
            for system, files in found.files.items()
        }
        hashes = {task: info["hash"] for task, info in tasks.items()}
        compared = suite_results(table, hashes, references=() if name == IN_POOL else (OWN, SISTER))
        for task in compared.pop("unlike"):
            found.failed[f"{name}: {task}"] = found.left_out[name][task] = UNLIKE
        suites[name] = compared | {
            "tasks": tasks,
            "left_out": found.left_out[name],
            "contamination": found.contamination["suites"].get(name, {}),
        }
        if name in found.admitted_tasks:
            suites[name]["admission"] = found.admitted_tasks[name]
        if measures := recipe.measure.measures:
            common = {task: tasks[task] for task in compared["common_tasks"]}
            if hit := _hits(name, common, found):
                suites[name]["hits"] = hit
            suites[name]["measures"] = by_measure(table, common, found.answers.get(name, {}), measures)
    facts = _score_facts(out, found.files)
    return {
        "format": FORMAT,
        "version": VERSION,
        "made": made(seconds)
        | installed_versions(*PACKAGES)
        | {"measuring_seconds": _measuring_seconds(found.files, facts)},
        "measured": _measured(facts),
        "recipe": recipe.without_paths(),
        "evaluation": asdict(EVALUATION),
        "resamples": RESAMPLES,
        "experts": found.experts,
        **({"admission": found.admission} if found.admission else {}),
        "multitask": found.multitask,
        "suites": suites,
        "claims": _claims(recipe.claims, suites),
        "chosen": found.chosen,
        "training_rows": {k: found.contamination[k] for k in ("read", "unread")},
        **found.traced,
        "complete": not found.failed,
        "failed": found.failed,
    }


def _hits(suite: str, tasks: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    names = page_names({s: list(of_suite) for s, of_suite in found.tasks.items()})
    shares = {t: s for t in tasks if (s := found.traced.get("shares", {}).get(names[suite, t])) is not None}
    chosen = {system: of_suites.get(suite, {}) for system, of_suites in found.chosen.items()}
    return hits(tasks, chosen, shares, [e["name"] for e in found.experts])


def _claims(floors: Mapping[str, float], suites: Mapping[str, Any]) -> dict[str, Any]:
    """Suite → the floor that the recipe claims for PHATGOOSE's share of the oracle's gain, the share, the verdict."""
    found = {}
    for suite, floor in floors.items():
        share = suites[suite]["oracle_gain_share"].get(MAIN, {}).get("share")
        found[suite] = {"floor": floor, "share": share, "holds": None if share is None else share >= floor}
    return found


def _score_facts(out: Path, files: Files) -> dict[str, dict[str, Any]]:
    """File of a score → what it was computed with, and how. Each file is read once."""
    names = {f: None for suites in files.values() for tasks in suites.values() for f in tasks.values()}
    found = {name: read_json(out / "scores" / name, EvaluationError) for name in names}
    return {name: {**data["key"], **data.get("made", {})} for name, data in found.items()}


def _measuring_seconds(
    files: Files, facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """System → suite → seconds that measuring took, in whichever run it was done; None where an older file doesn't say.

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
    """What the scores were computed with. Several values of one thing mean that not all were computed alike."""
    found: dict[str, dict[str, Any]] = {name: {} for name in (*ALIKE, "base")}
    for one in facts.values():
        public = {**one, "base": {**one["base"], "spec": local_name(str(one["base"].get("spec")))}}
        for name in found:
            if name in public:
                found[name][json.dumps(public[name], sort_keys=True)] = public[name]
    return {name: list(values.values()) for name, values in found.items()}


def suite_results(table: Table, tasks: Mapping[str, str], references: Sequence[str] = ()) -> dict[str, Any]:
    """Means, intervals and comparisons on the tasks that every system was measured on.

    "unlike" lists the tasks whose rows differ between systems. A system without any score is left out; otherwise no
    task would be common to all.

    Args:
        tasks: by name, the hash that each had when it was checked, and when experts were chosen on it.
        references: systems that there needn't be for each task. One that lacks a common task has no mean.
    """
    table = {system: row for system, row in table.items() if row}
    # Means are only comparable over the same tasks and rows, so a task that one system lacks is out for all.
    deciding = [row for system, row in table.items() if system not in references] or list(table.values())
    common = [t for t in tasks if deciding and all(t in row for row in deciding)]
    measured = {t: {(row[t].task_hash, row[t].rows) for row in table.values() if t in row} for t in common}
    unlike = [t for t in common if len(measured[t]) > 1 or {h for h, _ in measured[t]} != {tasks[t]}]
    common = [t for t in common if t not in unlike]
    systems: dict[str, dict[str, Any]] = {}
    for system, row in table.items():
        scores = {
            t: {"mean": s.mean, "low": s.low, "high": s.high, "rows": s.rows, "raw_rows": s.raw_rows,
                "metric": s.metric, "cut": s.truncated_rows}
            for t, s in row.items()
        }  # fmt: skip
        systems[system] = {"tasks": scores}
    results = {
        "common_tasks": common, "systems": systems, "against": {}, "oracle_gain_share": {}, "unlike": unlike,
    }  # fmt: skip
    if not common:
        return results
    table = {system: row for system, row in table.items() if all(t in row for t in common)}
    means, drawn = resampled_means(table, common)
    for system in table:
        systems[system] |= {"mean": means[system]} | interval(drawn[system])
    results["against"] = {o: against(means, drawn, o) for o in (BASE, MAIN) if o in table}
    if ORACLE in table and BASE in table:
        results["oracle_gain_share"] = {
            s: share_of_gain(means, drawn, s) for s in table if s not in (BASE, ORACLE)
        }
    return results


def resampled_means(table: Table, tasks: Sequence[str]) -> tuple[dict[str, float], Resampled]:
    """(system → its unweighted mean over tasks, system → the same in each resample of the rows).

    Rows that show one raw row under several prompts are drawn together.
    """
    points = [np.array([[p.points for p in row[t].predictions] for row in table.values()]) for t in tasks]
    groups = [next(iter(table.values()))[task].groups for task in tasks]
    drawn = resampled(points, groups=groups, resamples=RESAMPLES)
    means = np.mean([p.mean(axis=1) for p in points], axis=0).tolist()
    return dict(zip(table, means, strict=True)), dict(zip(table, drawn, strict=True))


def against(means: Mapping[str, float], drawn: Resampled, other: str) -> dict[str, Any]:
    """Every system minus `other` on the same rows: mean, 95 % interval, p, and p adjusted by Holm over the systems."""
    differences = {s: drawn[s] - drawn[other] for s in drawn if s != other}
    values = [two_sided_p(d) for d in differences.values()]
    return {
        system: {"difference": means[system] - means[other], **interval(found), "p": p, "p_holm": adjusted}
        for (system, found), p, adjusted in zip(differences.items(), values, holm(values), strict=True)
    }


def share_of_gain(means: Mapping[str, float], drawn: Resampled, system: str) -> dict[str, float | None]:
    """(system − base) / (oracle − base) with its 95 % interval: {"share", "low", "high"}.

    All are None if the oracle gains too little over the base. If its gain vanishes in some resample, the share has no
    interval, and a ratio to a gain that may be zero says nothing.
    """
    # Joint resamples: numerator and denominator of one resample are of the same rows.
    gain, gains = means[ORACLE] - means[BASE], drawn[ORACLE] - drawn[BASE]
    if gain <= 0 or not (gains > 0).all():
        return {"share": None, "low": None, "high": None}
    share = (means[system] - means[BASE]) / gain
    return {"share": share, **interval((drawn[system] - drawn[BASE]) / gains)}


def made(seconds: float) -> dict[str, Any]:
    """When, where and with which packages results were made; `seconds` without what an earlier run had finished."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **installed_versions("phatgoose", "torch", "transformers", "peft"),
        "machine": _machine(),
        "seconds": round(seconds, 1),
    }


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = [platform.processor() or "unknown CPU"]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")] or names
    return f"{platform.machine()}, {names[0]}, {cores} cores"
