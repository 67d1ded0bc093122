"""Bootstrap intervals against direct computation."""

import numpy as np
import pytest

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.statistics import bootstrap_interval, paired_difference, suite_interval


def test_interval_is_the_percentiles_of_resampled_means():
    values = [1.0] * 30 + [0.0] * 70
    low, high = bootstrap_interval(values, resamples=20_000)
    # A resampled mean is Binomial(100, 0.3) / 100, whose 2.5 and 97.5 percentiles are 0.21 and 0.39.
    assert low == pytest.approx(0.21, abs=0.011)
    assert high == pytest.approx(0.39, abs=0.011)
    narrow = bootstrap_interval(values, level=0.5, resamples=20_000)
    assert low < narrow[0] < 0.3 < narrow[1] < high


def test_suite_interval_resamples_within_each_task():
    # Two tasks of unequal size whose rows all agree: only resampling across tasks would give a width.
    assert suite_interval([[1.0] * 3, [0.0] * 50]) == (0.5, 0.5)
    tasks = [np.arange(7.0), np.array([0.0, 1.0, 1.0])]
    low, high = suite_interval(tasks, resamples=50_000)
    spread = np.sqrt(sum(t.var() / len(t) for t in tasks)) / 2  # of the mean of two independent means
    middle = np.mean([t.mean() for t in tasks])
    assert low == pytest.approx(middle - 1.96 * spread, abs=0.06)
    assert high == pytest.approx(middle + 1.96 * spread, abs=0.06)


def test_suite_of_one_task_is_its_own_interval():
    values = np.random.default_rng(3).random(41)
    assert suite_interval([values], seed=5) == bootstrap_interval(values, seed=5)


def test_large_tasks_are_drawn_in_chunks(monkeypatch):
    values = np.random.default_rng(0).random(500)
    whole = bootstrap_interval(values, resamples=301)
    monkeypatch.setattr("phatgoose.evaluation.statistics._CHUNK", 500 * 7)
    assert bootstrap_interval(values, resamples=301) == whole


def test_paired_difference_cancels_what_the_rows_share():
    draws = np.random.default_rng(1)
    hard = [draws.random(60), draws.random(40)]
    better = [h + 0.1 for h in hard]
    mean, low, high = paired_difference(better, hard)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert suite_interval(better)[0] < suite_interval(hard)[1]  # unpaired, the intervals overlap
    a, b = [[1.0, 1.0, 0.0], [1.0]], [[0.0, 1.0, 1.0], [0.0]]
    mean, low, high = paired_difference(a, b)
    assert mean == pytest.approx(0.5)
    assert (low, high) == suite_interval([[1.0, 0.0, -1.0], [1.0]])
    assert paired_difference(b, a)[0] == -mean


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("rows", [1, 5])
def test_no_spread_no_width(value, rows):
    assert bootstrap_interval([value] * rows) == pytest.approx((value, value))


def test_seed_decides():
    values = np.random.default_rng(0).random(30)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: bootstrap_interval([]), "one value a row"),
        (lambda: suite_interval([]), "at least one task"),
        (lambda: suite_interval([[1.0], []]), "task 1"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "finite"),
        (lambda: bootstrap_interval([1.0], level=1.0), "level"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resample"),
        (lambda: paired_difference([[1.0, 0.0]], [[1.0]]), "same rows"),
    ],
)
def test_bad_input(call, what):
    with pytest.raises(EvaluationError, match=what):
        call()
