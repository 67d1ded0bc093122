"""ROUGE-L against its definition, and a task that is measured by it."""

from __future__ import annotations

import re

import pytest

from phatgoose.errors import UnknownName
from phatgoose.evaluation.results import scores_from_json, scores_to_json
from phatgoose.evaluation.run import evaluate
from phatgoose.records import Example, Prediction, Task

pytest.importorskip("rouge_score", reason="rouge-score is not installed")

from phatgoose.evaluation.rouge import graded, rouge_l


def by_definition(text, target):
    a, b = (re.findall(r"[a-z0-9]+", t.lower()) for t in (text, target))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


@pytest.mark.slow(4)
@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("the dog ran home", ["The dog, ran to home."]),
        ("", ["x"]),
        ("b a", ["a b", "c"]),
        ("Same words", ["same words"]),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(text, targets):
    assert rouge_l(text, targets) == pytest.approx(max(by_definition(text, t) for t in targets))


def test_graded_predictions_keep_their_text():
    found = graded("rougeL", [Prediction(False, "a b"), Prediction(False, "a b c d")], [["a b"], ["a b"]])
    assert [(p.correct, p.points) for p in found] == [(True, 1), (False, pytest.approx(2 / 3))]
    with pytest.raises(UnknownName, match="metric 'rougel'"):
        graded("rougel", [], [])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_tasks_metric_scores_what_is_generated(make_base, family):
    rows = tuple(Example(f"the fox {i}", ("the quick brown fox",)) for i in range(4))
    base = make_base(family)
    plain = evaluate(base, Task("plain", (), (), rows))
    task = Task("rouge", (), (), (*rows, Example("yes or no", ("yes",), ("yes", "no"))), {"metric": "rougeL"})
    scores = evaluate(base, task)
    assert scores.tasks[0].metric == "accuracy (rank) / rougeL"
    assert plain.tasks[0].metric == "exact match"
    for prediction in scores.tasks[0].predictions[:4]:
        assert prediction.value == pytest.approx(by_definition(prediction.text, "the quick brown fox"))
    assert scores.tasks[0].predictions[4].value is None
    points = [p.points for p in scores.tasks[0].predictions]
    assert scores.mean == pytest.approx(sum(points) / 5)
    assert scores_from_json(scores_to_json(scores)) == scores
