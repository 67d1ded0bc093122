"""From the scores of all systems to the numbers that are reported: group means, comparisons, the share recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phatgoose.evaluation.statistics import paired_difference, resampled, suite_interval
from phatgoose.records import TaskScore
from phatgoose.workflows.experiment.systems import BASE, ORACLE

GROUPS = ("in-pool", "held-out")
RESAMPLES = 20_000
"""Of all intervals and p-values. Holm over 25 systems multiplies the least p-value that there is by 24: to 0.0024."""

Table = Mapping[str, Mapping[str, TaskScore]]
"""System → task → score; every system has every task, on the same rows."""
Drawn = Mapping[str, NDArray[np.float64]]
"""System → its mean over tasks in every resample of their rows, the same resamples for all: [resamples]."""


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


def recovered(table: Table, tasks: Sequence[str], system: str) -> dict[str, float | None]:
    """`share_of_gain` of means over tasks, with (raw) rows resampled jointly for the three systems."""
    names = (system, BASE, ORACLE)
    points = [np.asarray([hits(table[name], [task])[0] for name in names]) for task in tasks]
    drawn = resampled(points, groups=raw_rows(table[system], tasks), resamples=RESAMPLES)
    means = np.mean([part.mean(axis=1) for part in points], axis=0).tolist()
    return share_of_gain(dict(zip(names, means, strict=True)), dict(zip(names, drawn, strict=True)), system)


def share_of_gain(means: Mapping[str, float], drawn: Drawn, system: str) -> dict[str, float | None]:
    """(system − base) / (oracle − base) with its 95 % interval: {"share", "low", "high"}.

    All None where the oracle gains too little over the base: if its gain vanishes in a resample, the share has no interval, and a
    ratio to a gain that may be none says nothing.
    """
    gain, gains = means[ORACLE] - means[BASE], drawn[ORACLE] - drawn[BASE]
    if gain <= 0 or not (gains > 0).all():
        return {"share": None, "low": None, "high": None}
    share = (means[system] - means[BASE]) / gain
    return {"share": share, **interval((drawn[system] - drawn[BASE]) / gains)}


def interval(drawn: NDArray[np.float64]) -> dict[str, float]:
    """The 95 % percentile interval of resampled values [resamples]: {"low", "high"}."""
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"low": low, "high": high}
