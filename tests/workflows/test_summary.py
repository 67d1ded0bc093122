"""Means, comparisons and shares of the oracle's gain against direct computation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from phatgoose.records import Prediction, TaskScore
from phatgoose.workflows.experiment.results import resampled_means, share_of_gain, suite_results


def score(task, rights):
    predictions = tuple(Prediction(bool(r), "x") for r in rights)
    return TaskScore(
        task, "test", "exact match", float(np.mean(rights)), 0.0, 1.0, len(rights), predictions=predictions
    )


def table(**systems):
    return {
        name: {task: score(task, rights) for task, rights in rows.items()} for name, rows in systems.items()
    }


def recovered(table, tasks, system):
    return share_of_gain(*resampled_means(table, tasks), system)


def compared(table):
    return suite_results(table, dict.fromkeys(("a", "b"), ""))


BASE = {"a": [0] * 10, "b": [1] * 2 + [0] * 8}
ORACLE = {"a": [1] * 8 + [0] * 2, "b": [1] * 10}
OURS = {"a": [1] * 4 + [0] * 6, "b": [1] * 10}


def test_share_recovered_is_the_ratio_of_mean_gains():
    t = table(base=BASE, oracle=ORACLE, ours=OURS)
    found = recovered(t, ["a", "b"], "ours")
    assert found["share"] == pytest.approx(((0.4 + 1.0) - (0 + 0.2)) / ((0.8 + 1.0) - (0 + 0.2)))
    assert found["low"] < found["share"] < found["high"]
    assert recovered(t, ["a", "b"], "oracle")["share"] == pytest.approx(1)
    assert recovered(t, ["a", "b"], "oracle")["low"] == pytest.approx(1)
    assert recovered(t, ["a", "b"], "base")["share"] == 0


def test_nothing_to_recover_is_said_not_divided():
    t = table(base=ORACLE, oracle=ORACLE, ours=OURS)
    assert recovered(t, ["a"], "ours") == {"share": None, "low": None, "high": None}
    t = table(base={"a": [0, 0, 1]}, oracle={"a": [0, 1, 1]}, ours={"a": [0, 1, 1]})
    # Some resamples hold no gain at all: the share would have no interval, so there is none.
    assert recovered(t, ["a"], "ours") == {"share": None, "low": None, "high": None}


def test_groups_and_comparisons():
    t = table(base=BASE, ours=OURS)
    found = compared(t)
    assert found["common_tasks"] == ["a", "b"]
    assert found["systems"]["ours"]["mean"] == pytest.approx(0.7)
    one = found["against"]["base"]["ours"]
    assert one["difference"] == pytest.approx(0.6)
    assert 0 < one["low"] < 0.6 < one["high"]
    assert suite_results(t, {})["systems"]["ours"].keys() == {"tasks"}


def test_rows_of_one_raw_row_make_wider_intervals():
    t = table(base=BASE, oracle=ORACLE, ours=OURS)
    groups = (0, 0, 0, 0, 0, 1, 2, 3, 4, 5)
    grouped = {n: {k: replace(s, groups=groups) for k, s in row.items()} for n, row in t.items()}
    plain, found = (recovered(x, ["a", "b"], "ours") for x in (t, grouped))
    assert found["share"] == plain["share"]
    assert found["high"] - found["low"] > plain["high"] - plain["low"]
    results = [compared(x) for x in (t, grouped)]
    one, other = (r["against"]["base"]["ours"] for r in results)
    assert one["difference"] == other["difference"]
    assert other["high"] - other["low"] > one["high"] - one["low"]
    means = [r["systems"]["ours"] for r in results]
    assert means[1]["low"] < means[0]["low"]
