"""AUC, label-centred accuracy and their bootstrap against their definitions, written as plainly as can be."""

from __future__ import annotations

import random

import numpy as np
import pytest

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.statistics import resampled_means
from phatgoose.records import Example, Prediction, TaskScore
from phatgoose.workflows.experiment.measures.values import (
    ACCURACY,
    AUC,
    BETWEEN,
    CENTRED,
    ROUGE,
    WITHIN,
    Answers,
    answers_of,
    measured,
    statistics_of,
)


def auc_by_definition(rows):
    """Rows of (scores, right), each by label: every pair of rows, for every label."""
    labels, areas = rows[0][0], []
    for label in labels:
        pairs = [
            (scores[label] - sum(scores.values()) / len(scores), others[label] - sum(others.values()) / len(others))
            for scores, right in rows if label in right
            for others, wrong in rows if label not in wrong
        ]  # fmt: skip
        if pairs:
            areas.append(
                sum(1.0 if a > b + 1e-9 else 0.5 if a > b - 1e-9 else 0.0 for a, b in pairs) / len(pairs)
            )
    return sum(areas) / len(areas) if areas else None


def centred_by_definition(rows):
    labels = list(rows[0][0])
    means = {label: sum(scores[label] for scores, _ in rows) / len(rows) for label in labels}
    points = 0.0
    for scores, right in rows:
        best = max(scores[label] - means[label] for label in labels)
        ties = [label for label in labels if scores[label] - means[label] > best - 1e-9]
        points += sum(label in right for label in ties) / len(ties)
    return points / len(rows)


def within_by_definition(rows):
    found = []
    for scores, right in rows:
        pairs = [(scores[a], scores[b]) for a in scores if a in right for b in scores if b not in right]
        if pairs:
            found.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    return sum(found) / len(found)


def made(systems, task="t"):
    """(scores, answers) of systems, each a list of rows (scores by choice, right choices), in any order of choices."""
    examples = [Example(str(i), tuple(right), tuple(scores)) for i, (scores, right) in enumerate(systems[0])]
    scores = []
    for rows in systems:
        best = [max(given, key=given.get) for given, _ in rows]
        predictions = tuple(
            Prediction(b in right, b, choice_scores=tuple(given.values()))
            for b, (given, right) in zip(best, rows, strict=True)
        )
        mean = sum(p.correct for p in predictions) / len(rows)
        scores.append(TaskScore(task, "test", "x", mean, 0, 1, len(rows), predictions=predictions))
    return scores, answers_of(examples)


def drawn_rows(draws, labels, count, *, coarse, several=False):
    """Rows with a label each (or two); `coarse` scores tie often."""
    rows = []
    for number in range(count):
        order = draws.sample(labels, len(labels))  # a row may list its choices in any order
        value = (lambda: draws.randrange(3) / 2 - 4) if coarse else (lambda: draws.gauss(-4, 1))
        right = [labels[number % len(labels)]] if number < len(labels) else [draws.choice(labels)]
        if several and draws.random() < 0.4:
            right = list(dict.fromkeys([*right, draws.choice(labels)]))
        rows.append(({label: value() for label in order}, right[: len(labels) - 1]))
    return rows


def values(systems, **more):
    scores, answers = made(systems)
    found = statistics_of(scores, answers, more.get("metric"))
    return measured(found.functions, len(systems[0]), more.get("groups", ()), 50, [0, 0]), found


@pytest.mark.parametrize("labels", [["no", "yes"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_measures_are_those_of_their_definitions(labels, coarse, several):
    draws = random.Random(len(labels) + 10 * coarse + 20 * several)
    one = drawn_rows(draws, labels, 40, coarse=coarse, several=several)
    other = [({k: v + draws.gauss(0, 1) for k, v in scores.items()}, right) for scores, right in one]
    found, kinds = values([one, other])
    assert (kinds.compares, kinds.undefined) == (BETWEEN, {})
    assert list(found) == [AUC, CENTRED, ACCURACY]
    assert found[AUC].values == pytest.approx([auc_by_definition(one), auc_by_definition(other)], abs=1e-12)
    assert found[CENTRED].values == pytest.approx(
        [centred_by_definition(rows) for rows in (one, other)], abs=1e-12
    )
    right = [np.mean([max(s, key=s.get) in r for s, r in rows]) for rows in (one, other)]
    assert found[ACCURACY].values == pytest.approx(right)


def test_a_resample_is_measured_as_its_rows_would_be():
    """Also where whole groups of rows are drawn: by the same draws as `resampled_means`."""
    draws = random.Random(5)
    rows = drawn_rows(draws, ["a", "b", "c"], 30, coarse=False)
    for groups in ((), tuple(i // 3 for i in range(30))):
        found, _ = values([rows], groups=groups)
        units = 10 if groups else 30
        picks = np.random.default_rng([0, 0]).integers(0, units, (50, units))
        for resample, pick in enumerate(picks):
            taken = [rows[i] for unit in pick for i in range(30) if (i // 3 if groups else i) == unit]
            assert found[AUC].drawn[0, resample] == pytest.approx(auc_by_definition(taken), abs=1e-12)
            assert found[CENTRED].drawn[0, resample] == pytest.approx(centred_by_definition(taken), abs=1e-12)
        points = np.array([[float(max(s, key=s.get) in r) for s, r in rows]])
        expected = resampled_means(points, groups, 50, np.random.default_rng([0, 0]))
        assert found[ACCURACY].drawn == pytest.approx(expected, abs=1e-12)


def test_neither_what_a_row_gives_all_nor_what_a_label_always_gets_changes_auc():
    draws = random.Random(6)
    rows = drawn_rows(draws, ["a", "b", "c"], 60, coarse=False)
    liked = {"a": 9.0, "b": 0.0, "c": -2.0}
    moved = []
    for scores, right in rows:
        offset = draws.gauss(0, 20)
        moved.append(({k: v + offset + liked[k] for k, v in scores.items()}, right))
    found, _ = values([rows, moved])
    for measure in (AUC, CENTRED):
        assert found[measure].values[0] == pytest.approx(found[measure].values[1], abs=1e-12)
        assert found[measure].drawn[0] == pytest.approx(found[measure].drawn[1], abs=1e-12)
    assert found[ACCURACY].values[1] == np.mean([right == ["a"] for _, right in rows])  # it says "a" to all


def test_a_model_that_does_not_read_is_blind():
    """The same scores in all rows: every pair and every label ties, whatever rounding says."""
    rows = [({"a": -0.1, "b": -0.7, "c": -1.3}, ["abc"[i % 3]]) for i in range(31)]
    found, _ = values([rows])
    assert found[AUC].values == [0.5]
    assert found[CENTRED].values == [pytest.approx(1 / 3)]
    assert set(np.round(found[CENTRED].drawn[0], 9)) == {round(1 / 3, 9)}


def test_choices_that_differ_from_row_to_row_are_compared_within_rows():
    draws = random.Random(7)
    rows = []
    for number in range(40):
        given = {f"{number} {k}": draws.randrange(6) / 3 for k in range(draws.randrange(2, 6))}
        rows.append((given, draws.sample(list(given), draws.choice([1, 1, 1, len(given) - 1]))))
    found, kinds = values([rows])
    assert kinds.compares == WITHIN
    assert kinds.undefined == {CENTRED: "its choices differ from row to row"}
    assert found[AUC].values == [pytest.approx(within_by_definition(rows), abs=1e-12)]
    picks = np.random.default_rng([0, 0]).integers(0, 40, (50, 40))
    expected = [within_by_definition([rows[i] for i in pick]) for pick in picks]
    assert found[AUC].drawn[0] == pytest.approx(expected, abs=1e-12)


def test_what_is_not_defined_is_said():
    generated = [Prediction(True, "x"), Prediction(False, "y", value=0.25)]
    score = TaskScore("t", "test", "rougeL", 0.6, 0, 1, 2, predictions=tuple(generated))
    found = statistics_of([score], Answers([[], []], [[], []]), "rougeL")
    assert list(found.functions) == [ROUGE]
    assert found.undefined == dict.fromkeys((AUC, CENTRED), "its answers are generated")
    assert measured(found.functions, 2, (), 10, [0, 0])[ROUGE].values == [0.625]
    always = [({"a": 0.0, "b": 1.0}, ["a"])] * 5
    _, kinds = values([always])
    assert kinds.undefined == {AUC: "the same answer is right in all its rows"}
    assert list(kinds.functions) == [CENTRED, ACCURACY]
    mixed, answers = made([always[:1]])
    more = TaskScore(
        "t", "test", "x", 0.5, 0, 1, 2, predictions=(*mixed[0].predictions, Prediction(True, "z"))
    )
    found = statistics_of([more], Answers([*answers.choices, []], [*answers.right, []]), None)
    assert found.undefined == dict.fromkeys((AUC, CENTRED), "not all its rows have choices")


def test_a_choice_counts_where_it_is_right_in_some_rows_only():
    """Of three labels, one is never right: the area is that of the two others."""
    draws = random.Random(8)
    rows = [({k: draws.gauss(0, 1) for k in "abc"}, ["ab"[i % 2]]) for i in range(20)]
    found, _ = values([rows])
    assert found[AUC].values == [pytest.approx(auc_by_definition(rows), abs=1e-12)]


def test_resamples_in_which_nothing_can_be_compared_are_drawn_again():
    rows = [({"a": 0.3 * i, "b": 1.0}, ["b" if i else "a"]) for i in range(4)]  # one row of "a"
    found, _ = values([rows])
    assert np.isfinite(found[AUC].drawn).all()
    assert found[AUC].drawn.shape == found[ACCURACY].drawn.shape == (1, 50)
    # A group that holds both kinds beside one that holds one kind only: a third of resamples lacks "a".
    pairs = [({"a": float(i), "b": 0.0}, ["a" if i == 0 else "b"]) for i in range(6)]
    grouped, _ = values([pairs], groups=(0, 0, 1, 1, 2, 2))
    assert set(grouped[AUC].drawn[0]) == {0.0}


def test_scores_of_other_rows_or_choices_are_refused():
    rows = [({"a": 0.0, "b": 1.0}, ["a"]), ({"a": 0.0, "b": 1.0}, ["b"])]
    scores, answers = made([rows])
    with pytest.raises(EvaluationError, match="t: 2 rows were measured, and 1 have answers"):
        statistics_of(scores, Answers(answers.choices[:1], answers.right[:1]), None)
    with pytest.raises(EvaluationError, match="t, row 0: its scores aren't those of its 3 choices"):
        statistics_of(scores, Answers([[0, 1, 2]] * 2, answers.right), None)
