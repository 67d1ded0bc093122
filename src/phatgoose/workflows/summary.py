"""From the scores of all systems to the numbers that are reported: group means, comparisons, the share recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phatgoose.evaluation.statistics import paired_difference, resampled_means, suite_interval
from phatgoose.records import TaskScore

GROUPS = ("in-pool", "held-out")
RESAMPLES = 2000

Table = Mapping[str, Mapping[str, TaskScore]]
"""System → task → score; every system has every task, on the same rows."""


def hits(scores: Mapping[str, TaskScore], tasks: Sequence[str]) -> list[list[float]]:
    """Right (1.0) or wrong (0.0) per row, or its graded score, one list a task."""
    return [[p.points for p in scores[task].predictions] for task in tasks]


def raw_rows(scores: Mapping[str, TaskScore], tasks: Sequence[str]) -> list[tuple[int, ...]]:
    """Which rows show the same raw row, one tuple a task: what intervals are told."""
    return [scores[task].groups for task in tasks]


def group_means(scores: Mapping[str, TaskScore], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Unweighted mean over each group's tasks, with its bootstrap 95 % interval."""
    found = {}
    for group, tasks in groups.items():
        if tasks:
            values = hits(scores, tasks)
            low, high = suite_interval(values, groups=raw_rows(scores, tasks), resamples=RESAMPLES)
            found[group] = {"mean": float(np.mean([np.mean(v) for v in values])), "low": low, "high": high}
    return found


def comparisons(
    table: Table, groups: Mapping[str, Sequence[str]], system: str, others: Sequence[str]
) -> list[dict[str, Any]]:
    """`system` minus each other one on the same rows: mean and paired bootstrap 95 % interval, per group."""
    found = []
    for group, tasks in groups.items():
        for other in others if tasks else ():
            mean, low, high = paired_difference(
                hits(table[system], tasks),
                hits(table[other], tasks),
                groups=raw_rows(table[system], tasks),
                resamples=RESAMPLES,
            )
            found.append(
                {"group": group, "a": system, "b": other, "difference": mean, "low": low, "high": high}
            )
    return found


def recovered(table: Table, tasks: Sequence[str], system: str, *, seed: int = 0) -> dict[str, float | None]:
    """(system − base)/(oracle − base), of means over tasks, with a 95 % interval from (raw) rows resampled jointly for all three.

    All None if the oracle gains nothing over the base; the interval is None where a resample's gain vanishes.
    """
    draws = np.random.default_rng(seed)
    parts = [[np.asarray(v, float) for v in hits(table[name], tasks)] for name in (system, "base", "oracle")]
    ours, base, best = (float(np.mean([v.mean() for v in part])) for part in parts)
    if best - base <= 0:
        return {"share": None, "low": None, "high": None}
    sums = np.zeros((3, RESAMPLES))
    for task, groups in enumerate(raw_rows(table[system], tasks)):
        sums += resampled_means(np.stack([part[task] for part in parts]), groups, RESAMPLES, draws)
    gains = sums[2] - sums[1]
    low = high = None
    if (gains > 0).all():
        low, high = (float(x) for x in np.quantile((sums[0] - sums[1]) / gains, [0.025, 0.975]))
    return {"share": (ours - base) / (best - base), "low": low, "high": high}
