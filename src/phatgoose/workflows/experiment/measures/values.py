"""Measures of stored predictions (AUC, label-centred accuracy, …), and their bootstrap over rows.

They need each row's choices and right answers beside the scores of its choices, but no model. A choice's score is its
log-likelihood per token.

**AUC** (`auc`). Raw scores hold two things that say nothing of a row's answer: what any answer would get after this
prompt, and what this label gets after any prompt. A model that knows the answer but likes one label is right on that
label's rows alone, so accuracy hides what it knows. Where all rows have the same choices, the row's mean is subtracted
from its scores, and each choice has the area under the ROC curve of "it is right" against the rest: the chance that
it scores more in a row where it is right than in one where it is wrong, ties counting half (Hanley and McNeil 1982;
one against the rest, Fawcett 2006). A constant added to a row, or to a label in all rows, changes no area. The margin
to the best other choice lacks the second property: a label that always wins would be in every margin. The task's AUC
is the unweighted mean over the choices that are right in some rows and wrong in others.

Where choices differ from row to row, there are no labels to compare between rows. Each row then has its own area: the
share of its pairs of a right and a wrong choice in which the right one scores more, ties counting half. Their mean is
the task's AUC, "within rows". Both are 0.5 for blind scores and 1 for perfect ones.

**Label-centred accuracy** (`centred-accuracy`). Each label's mean score over the measured rows is subtracted before the
best is taken, which removes a liking for a label (compare Zhou et al. 2023, arXiv 2309.17249). Only where all rows have
the same choices. Labels that tie share the row's point. The means are of the rows that are measured, without their
answers; a resample of rows has means of its own.

**Accuracy** and **ROUGE-L** are the mean of the rows' points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phatgoose.errors import EvaluationError
from phatgoose.records import Example, TaskScore

AUC, CENTRED, ACCURACY, ROUGE = "auc", "centred-accuracy", "accuracy", "rougeL"
MEASURES = {AUC: "AUC", CENTRED: "Label-centred accuracy", ACCURACY: "Accuracy", ROUGE: "ROUGE-L"}
"""Name in recipes and results → name in tables."""
BETWEEN, WITHIN = "between rows", "within rows"
"""How a task's AUC compares right and wrong choices."""

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""How often each row counts, [rows, resamples] → a measure of every system, [systems, resamples]; NaN where a resample
leaves it undefined, for all systems alike."""

_DECIMALS = 9
"""Scores that agree to so many decimals tie: subtracting means leaves rounding errors of 1e-15."""
_CHUNK = 2**18  # row counts at a time: a few megabytes of temporary arrays


class Answers(NamedTuple):
    """What can be chosen on a task's rows, and what is right, as plain data. Choices are numbered in order of first
    appearance in the task; a row without choices has none."""

    choices: Sequence[Sequence[int]]
    """Of each row, in the order of its `choice_scores`."""
    right: Sequence[Sequence[int]]
    """Of each row, the right ones."""


def answers_of(rows: Sequence[Example]) -> Answers:
    """The choices and right answers of some rows."""
    numbers: dict[str, int] = {}
    choices = [[numbers.setdefault(c, len(numbers)) for c in row.choices or ()] for row in rows]
    return Answers(choices, [[numbers[t] for t in row.targets] if row.choices else [] for row in rows])


class Statistics(NamedTuple):
    """The measures of a task."""

    functions: dict[str, Statistic]
    """Measure → how it is computed."""
    undefined: dict[str, str]
    """Measure → why the task has none."""
    compares: str = ""
    """How its AUC compares choices, BETWEEN or WITHIN."""


class Measured(NamedTuple):
    """One measure of several systems on a task."""

    values: list[float]
    """Of each system."""
    drawn: Array
    """The same in each resample of the rows, [systems, resamples]; all systems see the same rows."""


def statistics_of(scores: Sequence[TaskScore], answers: Answers, metric: str | None) -> Statistics:
    """What can be measured on a task from its systems' scores.

    Args:
        scores: of each system, on the same rows.
        metric: the task's metric, if it isn't accuracy.

    Raises:
        EvaluationError: a score has other rows or choices than `answers`.
    """
    points = np.array([[p.points for p in s.predictions] for s in scores])
    if points.shape[1] != len(answers.choices):
        raise EvaluationError(
            f"{scores[0].task}: {points.shape[1]} rows were measured, and {len(answers.choices)} have answers."
        )
    mean: dict[str, Statistic] = {
        ROUGE if metric == ROUGE else ACCURACY: lambda w: points @ w / w.sum(axis=0)
    }
    if not all(answers.choices):
        why = "not all its rows have choices" if any(answers.choices) else "its answers are generated"
        return Statistics(mean, {AUC: why, CENTRED: why})
    given = [_choice_scores(one, answers) for one in scores]
    labels = sorted(answers.choices[0])
    if any(sorted(row) != labels for row in answers.choices):
        areas = np.array(
            [[_pairs(s, *row) for s, *row in zip(rows, *answers, strict=True)] for rows in given]
        )
        differ = "its choices differ from row to row"
        if np.isnan(areas[0]).all():
            return Statistics(mean, {AUC: "all choices are right in all its rows", CENTRED: differ})
        return Statistics({AUC: lambda w: _mean_of_defined(areas, w), **mean}, {CENTRED: differ}, WITHIN)
    order = [np.argsort(row) for row in answers.choices]
    placed = np.array([[np.asarray(s)[o] for s, o in zip(rows, order, strict=True)] for rows in given])
    right = np.array([[label in row for label in labels] for row in answers.right])
    functions: dict[str, Statistic] = {CENTRED: lambda w: centred_accuracy(placed, right, w), **mean}
    if (right.all(axis=0) | ~right.any(axis=0)).all():
        return Statistics(functions, {AUC: "the same answer is right in all its rows"})
    return Statistics({AUC: lambda w: area_under_curve(placed, right, w), **functions}, {}, BETWEEN)


def area_under_curve(scores: Array, right: NDArray[np.bool_], weights: Array) -> Array:
    """The mean area of each choice against the rest, where rows have the same choices: [systems, resamples].

    Args:
        scores: [systems, rows, choices].
        right: [rows, choices].
        weights: how often each row counts, [rows, resamples].
    """
    values = np.round(scores - scores.mean(axis=2, keepdims=True), _DECIMALS)
    # Of two choices with one right in each row, the areas are equal: scores and answers are mirrored.
    mirrored = right.shape[1] == 2 and (right.sum(axis=1) == 1).all()
    totals, defined = np.zeros((len(scores), weights.shape[1])), np.zeros(weights.shape[1])
    for choice in range(1 if mirrored else right.shape[1]):
        yes = right[:, choice]
        pairs = weights[yes].sum(axis=0) * weights[~yes].sum(axis=0)
        for system, value in enumerate(values[:, :, choice]):
            totals[system] += _wins(value, yes, weights) / np.where(pairs > 0, pairs, 1)
        defined += pairs > 0
    with np.errstate(invalid="ignore"):
        return totals / defined


def _wins(values: Array, yes: NDArray[np.bool_], weights: Array) -> Array:
    """Pairs of a row of `yes` and another in which the first has the larger value, ties counting half: [resamples]."""
    order = np.argsort(values[~yes])
    rivals, ours = values[~yes][order], values[yes]
    below = np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(weights[~yes][order], axis=0)])
    beaten = below[np.searchsorted(rivals, ours, "left")] + below[np.searchsorted(rivals, ours, "right")]
    return np.einsum("rs,rs->s", weights[yes], beaten) / 2


def centred_accuracy(scores: Array, right: NDArray[np.bool_], weights: Array) -> Array:
    """Accuracy after each choice's mean over the rows is subtracted from its scores: [systems, resamples].

    Args: as `area_under_curve`.
    """
    rows, found = weights.sum(axis=0), []
    for system in scores:
        means = system.T @ weights / rows
        centred = [np.round(s[:, None] - m, _DECIMALS) for s, m in zip(system.T, means, strict=True)]
        best = np.maximum.reduce(centred)
        first = [one == best for one in centred]
        hits = sum(f & r[:, None] for f, r in zip(first, right.T, strict=True)) / np.add.reduce(
            first, dtype=float
        )
        found.append((weights * hits).sum(axis=0) / rows)
    return np.array(found)


def _choice_scores(score: TaskScore, answers: Answers) -> list[tuple[float, ...]]:
    found = []
    for number, (made, choices) in enumerate(zip(score.predictions, answers.choices, strict=True)):
        if made.choice_scores is None or len(made.choice_scores) != len(choices):
            raise EvaluationError(
                f"{score.task}, row {number}: its scores aren't those of its {len(choices)} choices."
            )
        found.append(made.choice_scores)
    return found


def _pairs(scores: Sequence[float], choices: Sequence[int], right: Sequence[int]) -> float:
    """The share of a row's pairs of a right and a wrong choice in which the right one scores more, or NaN."""
    values, yes = np.asarray(scores), np.isin(choices, right)
    if yes.all() or not yes.any():
        return float("nan")
    return float(_wins(values, yes, np.ones((len(values), 1)))[0] / (yes.sum() * (~yes).sum()))


def _mean_of_defined(values: Array, weights: Array) -> Array:
    """The weighted mean over rows, without rows that have no value (all systems lack the same ones)."""
    there = ~np.isnan(values[0])
    with np.errstate(invalid="ignore"):
        return values[:, there] @ weights[there] / weights[there].sum(axis=0)


def measured(
    statistics: Mapping[str, Statistic], rows: int, groups: Sequence[int], resamples: int, seed: Sequence[int]
) -> dict[str, Measured]:
    """Every measure on the rows and on resamples of them, which are the same for all measures and systems.

    Resamples are drawn as in `phatgoose.evaluation.statistics`, whole groups together. One that leaves a measure
    undefined, since no choice is right in some of its rows and wrong in others, is drawn again for that measure.
    """
    chunks: dict[str, list[Array]] = {name: [] for name in statistics}
    draws = np.random.default_rng(list(seed))
    for weights in _weights(rows, groups, resamples, draws):
        for name, statistic in statistics.items():
            chunks[name].append(statistic(weights))
    again = np.random.default_rng([*seed, 1])
    found = {}
    for name, statistic in statistics.items():
        values, drawn = statistic(np.ones((rows, 1)))[:, 0].tolist(), np.concatenate(chunks[name], axis=1)
        while (missing := np.isnan(drawn[0])).any():
            drawn[:, missing] = np.concatenate(
                [statistic(w) for w in _weights(rows, groups, int(missing.sum()), again)], axis=1
            )
        found[name] = Measured(values, drawn)
    return found


def interval(drawn: Array) -> dict[str, float]:
    """The 95 % percentile interval of resampled values [resamples]: {"low", "high"}."""
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"low": low, "high": high}


def _weights(rows: int, groups: Sequence[int], resamples: int, draws: np.random.Generator) -> Iterator[Array]:
    """How often each row counts in each resample, [rows, resamples], in parts."""
    _, group_of = np.unique(np.asarray(groups if len(groups) else range(rows)), return_inverse=True)
    units = int(group_of.max()) + 1
    step = max(1, _CHUNK // units)
    for start in range(0, resamples, step):
        many = min(step, resamples - start)
        picks = draws.integers(0, units, (many, units)) + units * np.arange(many)[:, None]
        counts = np.bincount(picks.ravel(), minlength=many * units).reshape(many, units)
        yield np.ascontiguousarray(counts.T[group_of], dtype=np.float64)
