"""Whom labels choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phatgoose.records import Example, Prediction, TaskScore
from phatgoose.workflows.experiment.systems import best, picks, rank, standing

ROWS = (Example("x", ("b",), ("a", "b")), Example("y", ("c",)), Example("z", ("a", "b"), ("a", "b", "c")))


def score(likely=-3.0, mean=0.5):
    made = (
        Prediction(False, "a", choice_scores=(-1.0, likely)),
        Prediction(True, "c"),
        Prediction(True, "a", choice_scores=(-1.0, -0.5, -2.0)),
    )
    return TaskScore("t", "validation", "x", mean, 0, 1, 3, predictions=made)


def test_ties_go_to_the_expert_that_finds_right_answers_likelier():
    scores = {"a": [[0.5, -1.0]], "b": [[0.5, -0.5]], "d": [[0.4, 0.0]]}
    assert best(scores) == "b"
    assert best({"first": [[0.5, None]], "second": [[0.5, None]]}) == "first"
    assert rank([[0.1, -1.0], [0.2, -1.0], [0.3, -1.0]]) == rank([[0.3, -1.0], [0.2, -1.0], [0.1, -1.0]])


def test_an_expert_stands_by_its_score_and_the_likelihood_of_right_choices():
    assert standing(score(), ROWS) == [0.5, pytest.approx((-3.0 - 0.5) / 2)]
    assert standing(replace(score(), predictions=score().predictions[1:2]), ROWS[1:2]) == [0.5, None]


def test_one_for_each_task_and_one_for_all():
    scores = {
        "a": {"t": [1.0, None], "u": [0.0, None]},
        "b": {"t": [0.9, None], "u": [0.5, None]},
        "c": {"t": [2.0, None]},
    }
    found = picks(scores, ["t", "u"], ["t", "u", "v"])
    assert found == {
        "oracle": {"t": "c", "u": "b"},
        "sister": {},
        "best-single": {"t": "b", "u": "b", "v": "b"},
    }
    assert picks({}, ["t"], ["t"]) == {"oracle": {}, "sister": {}, "best-single": {}}


def test_sisters_are_the_best_of_those_that_a_task_names():
    scores = {"a": {"t": [1.0, None], "u": [0.0, None]}, "b": {"t": [0.9, None], "u": [0.5, None]}}
    named = {"t": ["b", "gone"], "u": ["a", "b"], "v": [], "w": ["gone"]}
    found = picks(scores, ["t", "u", "v"], ["t", "u", "v", "w"], named)
    assert found["sister"] == {"t": "b", "u": "b", "v": None}  # none is there for "w", and "v" names none
    assert found["oracle"] == {"t": "a", "u": "b"}
    # Where no task of a suite names any, the system isn't measured.
    assert picks(scores, ["t"], ["t", "u"], {"t": [], "u": []})["sister"] == {}
