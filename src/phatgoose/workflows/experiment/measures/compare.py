"""Systems compared by each measure: on all tasks of a suite, on each tier, and by clusters of tasks.

Three sources of chance are told apart. Intervals and p-values are of the rows, as everywhere. `clusters` is the
interval of a difference if other clusters of tasks had been picked: whole clusters are drawn, and the tasks' values
stay as they are. Neither knows of training seeds.

What the rows can show at all is `smallest`: the smallest true difference that a two-sided test at 5 % finds in 80 % of
draws of rows, (1.96 + 0.84) standard errors of the paired difference; `smallest_holm` the same at the level that Holm's
first step asks of a family of so many systems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from phatgoose.evaluation.statistics import holm, resampled_means, two_sided_p
from phatgoose.records import TaskScore
from phatgoose.tasks.lists.entries import TIERS
from phatgoose.workflows.experiment.measures.values import (
    AUC,
    Answers,
    Array,
    Measured,
    interval,
    measured,
    statistics_of,
)
from phatgoose.workflows.experiment.scores import RESAMPLES
from phatgoose.workflows.experiment.systems import BASE, MAIN

LEVEL, POWER = 0.05, 0.8
FEWEST_CLUSTERS = 2
ALL = "all"
"""Beside the tiers: all tasks."""


class _Sums:
    """A measure over a set of tasks, added up task by task: a suite's resamples don't fit into memory one by one."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.clusters: list[str] = []
        self.values: dict[str, list[float]] = {}
        self.drawn: dict[str, Array] = {}

    def add(self, task: str, cluster: str, systems: Sequence[str], found: Measured) -> None:
        self.tasks.append(task)
        self.clusters.append(cluster)
        for system, value, drawn in zip(systems, found.values, found.drawn, strict=True):
            self.values.setdefault(system, []).append(value)
            # An array of its own, or all of the task's would stay in memory.
            self.drawn[system] = self.drawn[system] + drawn if system in self.drawn else drawn.copy()

    def results(self, primary: bool) -> dict[str, Any]:
        """Means, and every system against the base and PHATGOOSE; a system that lacks one of the tasks is left out."""
        whole = {s: np.array(values) for s, values in self.values.items() if len(values) == len(self.tasks)}
        drawn = {s: self.drawn[s] / len(self.tasks) for s in whole}
        of_clusters = self._drawn_by_clusters(whole)
        found: dict[str, Any] = {
            "tasks": self.tasks,
            "systems": {s: {"mean": float(v.mean()), **interval(drawn[s])} for s, v in whole.items()},
            "against": {},
        }
        if all(self.clusters):
            found["clusters"] = len(set(self.clusters))
        for other in (o for o in (BASE, MAIN) if o in whole):
            rest = [s for s in whole if s != other]
            differences = {s: drawn[s] - drawn[other] for s in rest}
            rows: dict[str, dict[str, Any]] = {
                s: {
                    "difference": float(whole[s].mean() - whole[other].mean()), **interval(differences[s]),
                    **smallest(differences[s], len(rest)),
                }
                for s in rest
            }  # fmt: skip
            if primary:
                values = [two_sided_p(differences[s]) for s in rest]
                for s, p, adjusted in zip(rest, values, holm(values), strict=True):
                    rows[s] |= {"p": p, "p_holm": adjusted}
            if of_clusters:
                for s in rest:
                    rows[s]["clusters"] = interval(of_clusters[s] - of_clusters[other])
            found["against"][other] = rows
        return found

    def _drawn_by_clusters(self, whole: Mapping[str, Array]) -> dict[str, Array]:
        """Each system's mean over the tasks of as many clusters, drawn with replacement; empty without clusters."""
        numbers = {cluster: n for n, cluster in enumerate(dict.fromkeys(self.clusters))}
        if not whole or not all(self.clusters) or len(numbers) < FEWEST_CLUSTERS:
            return {}
        groups, draws = [numbers[c] for c in self.clusters], np.random.default_rng(0)
        drawn = resampled_means(np.array(list(whole.values())), groups, RESAMPLES, draws)
        return dict(zip(whole, drawn, strict=True))


def by_measure(
    table: Mapping[str, Mapping[str, TaskScore]],
    tasks: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Answers],
    measures: Sequence[str],
) -> dict[str, Any]:
    """Measure → its value of each task and system, "all" (as `_Sums.results`), and the same of each tier under "tiers".

    The first of `measures` that the suite has is the primary one: only its comparisons have p-values, adjusted by Holm
    over the systems; each tier is a family of its own.

    Args:
        table: system → task → its score. A system may lack tasks, then it has no mean where they count.
        tasks: what is known of each task that is compared.
        answers: of the measured rows of each.
    """
    sums: dict[str, dict[str, _Sums]] = {name: {} for name in measures}
    found: dict[str, Any] = {name: {"tasks": {}, "undefined": {}} for name in measures}
    for number, (task, info) in enumerate(tasks.items()):
        systems = [s for s in table if task in table[s]]
        scores = [table[s][task] for s in systems]
        statistics = statistics_of(scores, answers[task], info["metric"])
        wanted = {name: one for name, one in statistics.functions.items() if name in measures}
        for name, one in measured(wanted, scores[0].rows, scores[0].groups, RESAMPLES, [0, number]).items():
            found[name]["tasks"][task] = {"systems": dict(zip(systems, one.values, strict=True))}
            if name == AUC:
                found[name]["tasks"][task]["compares"] = statistics.compares
            for part in filter(None, (ALL, info.get("tier"))):
                sums[name].setdefault(part, _Sums()).add(task, info.get("cluster", ""), systems, one)
        for name in statistics.undefined.keys() & found.keys():
            found[name]["undefined"][task] = statistics.undefined[name]
    defined = [name for name in measures if sums[name]]
    for name in defined:
        parts = {
            part: sums[name][part].results(name == defined[0]) for part in (ALL, *TIERS) if part in sums[name]
        }
        found[name] |= {ALL: parts.pop(ALL), "tiers": parts}
    return {name: found[name] for name in defined}


def smallest(differences: Array, comparisons: int) -> dict[str, float]:
    """The smallest difference that the rows can show, from resampled differences: alone, and among `comparisons`."""
    error, normal = float(np.std(differences, ddof=1)), NormalDist()
    detected = normal.inv_cdf(POWER)
    return {
        "error": error,
        "smallest": (normal.inv_cdf(1 - LEVEL / 2) + detected) * error,
        "smallest_holm": (normal.inv_cdf(1 - LEVEL / 2 / comparisons) + detected) * error,
    }
