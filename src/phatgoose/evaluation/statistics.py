"""Bootstrap intervals: what a score would have been on other rows of the same tasks.

A resample draws each task's rows with replacement, task by task (stratified), and takes the unweighted mean of the
tasks' means. The interval speaks about the choice of rows only, not about seeds, prompts or other tasks. Where all
rows agree, one row included, it has no width: the data show no spread, which is not the same as certainty.

Rows that show one raw row under several prompts aren't independent. Where a task's `groups` say which rows belong
together, whole groups are drawn, as many as there are, and a resample's mean is that of all rows in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phatgoose.errors import EvaluationError

_CHUNK = 2**22  # row numbers drawn at a time: bounds the memory of a large task

Groups = Sequence[int]
"""The group of each row of a task, as a number; rows of a group are drawn together. Empty: every row by itself."""


def bootstrap_interval(
    values: ArrayLike,
    *,
    groups: Groups = (),
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of the mean of `values` [rows], e.g. 1.0 for a right answer and 0.0 for a wrong one.

    Raises:
        EvaluationError: if there are no values, one is not finite, or a setting is out of range.
    """
    return suite_interval([values], groups=[groups], level=level, resamples=resamples, seed=seed)


def suite_interval(
    tasks: Sequence[ArrayLike],
    *,
    groups: Sequence[Groups] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of the unweighted mean over tasks; `tasks` holds one array [rows] for each, of any lengths.

    Raises:
        EvaluationError: if there is no task, a task has no values, groups don't fit the rows, or as in
            `bootstrap_interval`.
    """
    if not 0 < level < 1:
        raise EvaluationError(f"an interval's level must lie between 0 and 1, got {level}.")
    if resamples < 1:
        raise EvaluationError(f"a bootstrap needs at least one resample, got {resamples}.")
    means = resampled(
        [values[None] for values in _arrays(tasks)], groups=groups, resamples=resamples, seed=seed
    )
    low, high = np.quantile(means[0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    *,
    groups: Sequence[Groups] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high) of a − b, two systems' values on the same rows: one array [rows] per task, tasks in one order.

    Rows are drawn in pairs, so what makes a row hard for both cancels. `a` beats `b` by more than chance in the
    choice of rows where low > 0.

    Raises:
        EvaluationError: if the two don't have the same tasks and rows, or as in `suite_interval`.
    """
    first, second = _arrays(a), _arrays(b)
    if (here := list(map(len, first))) != (there := list(map(len, second))):
        raise EvaluationError(
            f"a paired difference needs the same rows on both sides, got {here} and {there} rows."
        )
    differences = [x - y for x, y in zip(first, second, strict=True)]
    low, high = suite_interval(differences, groups=groups, level=level, resamples=resamples, seed=seed)
    return float(np.mean([x.mean() for x in differences])), low, high


def resampled(
    tasks: Sequence[NDArray[np.float64]],
    *,
    groups: Sequence[Groups] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Every resample's unweighted mean over tasks, the same rows for all systems: [systems, resamples].

    So intervals of means, of differences and of ratios, and p-values, come from one set of draws; `suite_interval` and
    `paired_difference` draw the same for the same seed.

    Args:
        tasks: one array [systems, rows] per task.

    Raises:
        EvaluationError: there is no task, or groups don't fit.
    """
    if not tasks:
        raise EvaluationError("a bootstrap needs at least one task, got none.")
    groups = [()] * len(tasks) if groups is None else groups
    if len(groups) != len(tasks):
        raise EvaluationError(f"there are groups for {len(groups)} tasks, and {len(tasks)} tasks.")
    totals = np.zeros((len(tasks[0]), resamples))
    for number, (values, belongs) in enumerate(zip(tasks, groups, strict=True)):
        # A stream of random numbers for each task, so that a task's draws don't depend on the ones before it.
        totals += resampled_means(values, belongs, resamples, np.random.default_rng([seed, number]))
    return totals / len(tasks)


def two_sided_p(differences: NDArray[np.float64]) -> float:
    """Two-sided bootstrap p-value of "two systems are equal on rows like these" from resampled differences [resamples].

    Twice the smaller share of differences at or beyond zero on either side, (count + 1) / (resamples + 1), at
    most 1. So it is below 0.05 about where the 95 % interval excludes zero, and never below 2 / (resamples + 1).
    If it is to be adjusted for many comparisons, use enough resamples to make this small compared with the level.
    """
    rounding = 1e-12  # means of differences that cancel aren't exactly zero
    below, above = int((differences <= rounding).sum()), int((differences >= -rounding).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: comparing each with α keeps the chance of any false discovery among them below α.

    adjusted_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)), with p_(1) ≤ … ≤ p_(m); in the order given.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _arrays(tasks: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(values, dtype=np.float64) for values in tasks]
    for number, values in enumerate(arrays):
        if values.ndim != 1 or not values.size:
            raise EvaluationError(
                f"an interval needs one value per row, got an array of shape {values.shape} (task {number})."
            )
        if not np.isfinite(values).all():
            raise EvaluationError(f"an interval needs finite values, task {number} has others.")
    return arrays


def resampled_means(
    values: NDArray[np.float64], groups: Groups, resamples: int, draws: np.random.Generator
) -> NDArray[np.float64]:
    """The means of `resamples` resamples of one task's rows, the same rows for all systems: [systems, rows] →
    [systems, resamples].
    """
    sums, counts = _grouped(values, groups)
    units = len(counts)
    step = max(1, _CHUNK // units)
    parts = []
    for start in range(0, resamples, step):
        picks = draws.integers(0, units, (min(step, resamples - start), units))
        rows = units if units == values.shape[1] else counts[picks].sum(axis=1)
        parts.append(np.stack([system[picks].sum(axis=1) / rows for system in sums]))
    return np.concatenate(parts, axis=1)


def _grouped(values: NDArray[np.float64], groups: Groups) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(sums [systems, groups], rows in each group [groups])."""
    if not len(groups):
        return values, np.ones(values.shape[1])
    if len(groups) != values.shape[1]:
        raise EvaluationError(f"groups of {len(groups)} rows don't fit a task of {values.shape[1]} rows.")
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(group_of).astype(np.float64)
    if len(counts) == values.shape[1]:
        return values, counts  # in the rows' own order, so that the draws are the same as without groups
    return np.stack([np.bincount(group_of, weights=system) for system in values]), counts
