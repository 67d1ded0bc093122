"""Bootstrap intervals against direct computation."""

import numpy as np
import pytest

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_difference,
    resampled,
    suite_interval,
    two_sided_p,
)


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
        (lambda: bootstrap_interval([]), "one value per row"),
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


def p_value(a, b, *, groups=None, resamples=2000):
    """Of the difference of two systems, tasks' rows as lists."""
    both = [np.array([x, y], dtype=float) for x, y in zip(a, b, strict=True)]
    first, second = resampled(both, groups=groups, resamples=resamples)
    return two_sided_p(first - second)


def test_p_values_agree_with_the_intervals_and_with_all_signs():
    """Against the exact bootstrap of three rows, and against the interval: p < 0.05 where it excludes zero."""
    a, b = (
        [[1.0, 1.0, 0.0]],
        [[0.0, 1.0, 0.0]],
    )  # differences 1, 0, 0: a resample's mean is 0 with probability (2/3)³
    assert p_value(a, b, resamples=20000) == pytest.approx(2 * (2 / 3) ** 3, abs=0.02)
    draws = np.random.default_rng(5)
    for shift in (0.0, 0.1, 0.2, 0.5):
        x = [list((draws.random(60) < 0.5 + shift).astype(float))]
        y = [list((draws.random(60) < 0.5).astype(float))]
        _, low, high = paired_difference(x, y)
        assert (p_value(x, y) < 0.05) == (low > 0 or high < 0) or min(abs(low), abs(high)) < 0.02
        assert p_value(x, y) == pytest.approx(p_value(y, x))
    assert p_value(x, x) == 1.0
    assert p_value([[1.0] * 30], [[0.0] * 30], resamples=999) == pytest.approx(2 / 1000)


def test_all_systems_are_resampled_together_as_each_pair_is_alone():
    draws = np.random.default_rng(3)
    tasks = [draws.random((3, rows)).round() for rows in (5, 40, 1)]
    groups = [(0, 0, 1, 1, 2), (), ()]
    drawn = resampled(tasks, groups=groups, resamples=500, seed=4)
    assert drawn.shape == (3, 500)
    for place in range(3):
        alone = suite_interval([t[place] for t in tasks], groups=groups, resamples=500, seed=4)
        assert np.quantile(drawn[place], [0.025, 0.975]) == pytest.approx(alone)
    pair = [t[0] for t in tasks], [t[2] for t in tasks]
    _, low, high = paired_difference(*pair, groups=groups, resamples=500, seed=4)
    assert np.quantile(drawn[0] - drawn[2], [0.025, 0.975]) == pytest.approx((low, high))
    for wrong in ([], [()]):
        with pytest.raises(EvaluationError):
            resampled(tasks if wrong else [], groups=wrong)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.02]) == [0.02]


def test_rows_that_belong_together_are_drawn_together():
    # Ten groups of ten equal rows say no more than ten rows do.
    one = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    many, groups = np.repeat(one, 10), np.repeat(np.arange(10), 10)
    assert bootstrap_interval(many, groups=groups.tolist()) == pytest.approx(bootstrap_interval(one))
    assert bootstrap_interval(many)[0] > bootstrap_interval(one)[0]
    zeros, twice = np.zeros(100), [groups.tolist()]
    assert paired_difference([many], [zeros], groups=twice) == pytest.approx(
        paired_difference([one], [zeros[:10]])
    )
    assert p_value([many], [1 - many], groups=twice) == p_value([one], [[1 - x for x in one]])


def test_a_resample_is_the_mean_of_all_rows_of_the_groups_it_draws():
    values, groups = [1.0, 1.0, 1.0, 0.0], [7, 7, 7, 3]
    # Both groups: 3/4; one of them twice, a quarter of resamples each: 0 or 1.
    assert bootstrap_interval(values, groups=groups, level=0.6, resamples=40_000) == (0.0, 1.0)
    mean = suite_interval([values], groups=[groups], level=0.01, resamples=40_000)
    assert mean == (0.75, 0.75)


def test_the_intervals_cover_as_often_as_they_say_where_raw_rows_decide():
    draws, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        groups = np.sort(np.concatenate([np.arange(40), draws.integers(0, 40, 60)]))
        values = (draws.random(40) < 0.5)[groups].astype(float)
        for place, belongs in enumerate(((), groups.tolist())):
            low, high = bootstrap_interval(values, groups=belongs, resamples=400)
            covered[place] += low <= 0.5 <= high
    assert covered[1] / 300 > 0.9
    assert covered[0] / 300 < 0.85


def test_groups_of_single_rows_change_nothing_and_others_must_fit():
    values = np.random.default_rng(1).random(13)
    assert bootstrap_interval(values, groups=range(13)) == bootstrap_interval(values)
    with pytest.raises(EvaluationError, match="groups of 2 rows don't fit a task of 13"):
        bootstrap_interval(values, groups=[0, 0])
    with pytest.raises(EvaluationError, match="groups for 1 tasks, and 2 tasks"):
        suite_interval([values, values], groups=[()])
