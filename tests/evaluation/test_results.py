"""Scores to JSON and back."""

import json

import pytest

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.results import scores_from_json, scores_to_json
from phatgoose.records import Prediction, Scores, TaskScore


def make_scores():
    predictions = (
        Prediction(True, "yes", choice_scores=(-0.1, -1 / 3)),
        Prediction(False, "nö\n\ufffd", complete=False),
    )
    task = TaskScore(
        "t", "test", "exact match", 0.5, 0.0, 1.0, 2, "abc", predictions, truncated_rows=1, groups=(0, 0)
    )
    return Scores((task, TaskScore("u", "validation", "accuracy (rank)", 1 / 3, 0.1, 0.7, 0)), 0.4, 0.2, 0.8)


def test_round_trip_through_text_is_exact():
    scores = make_scores()
    assert scores_from_json(json.loads(json.dumps(scores_to_json(scores), allow_nan=False))) == scores
    assert scores_from_json(scores_to_json(scores)) == scores


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.update(format=2), "format 1.*found 2"),
        (lambda d: d.pop("format"), "format 1"),
        (lambda d: d.pop("tasks"), "tasks"),
        (lambda d: d.pop("mean"), "mean"),
        (lambda d: d.update(mean="high"), "Scores.mean"),
        (lambda d: d["tasks"][0].pop("metric"), "metric"),
        (lambda d: d["tasks"][0].update(colour=1), "colour"),
        (lambda d: d["tasks"][0].update(split="tset"), "tset"),
        (lambda d: d["tasks"][0].update(rows=3), "3 rows"),
        (lambda d: d["tasks"][0].update(groups=[0]), "groups for 1 of 2 rows"),
        (lambda d: d["tasks"][0].update(groups=["x", "y"]), "no whole numbers"),
        (lambda d: d["tasks"][0]["predictions"].append("yes"), "Prediction"),
        (lambda d: d["tasks"][0]["predictions"][0].update(correct="yes"), "Prediction.correct"),
    ],
)
def test_damaged_scores_are_refused(spoil, message):
    data = json.loads(json.dumps(scores_to_json(make_scores())))
    spoil(data)
    with pytest.raises(EvaluationError, match=message):
        scores_from_json(data)


def test_not_even_an_object():
    with pytest.raises(EvaluationError, match="list"):
        scores_from_json([])


def test_scores_from_before_there_were_groups_can_be_read():
    data = scores_to_json(make_scores())
    del data["tasks"][0]["groups"]
    found = scores_from_json(data).tasks[0]
    assert (found.groups, found.raw_rows, make_scores().tasks[0].raw_rows) == ((), 2, 1)
