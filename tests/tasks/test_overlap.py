"""Contamination: shared runs of words are found, prompts that a task shows in every row are not."""

from __future__ import annotations

from phatgoose.records import Example
from phatgoose.tasks.contamination import Overlaps, runs


def overlap(n, trained, rows, own=None):
    """What is found of one measured task, trained: (name, rows) in their order."""
    found = Overlaps(n)
    found.measured("held", rows, own=own)
    for name, examples in trained:
        found.trained(name, examples)
    (one,) = found.found()
    return one


def test_a_shared_run_is_found_whatever_its_case_and_marks():
    rows = [
        Example("zero one two three four five", ("x",)),
        Example("one two three four 5", ("x",)),
        Example("a b", ("c",)),
    ]
    found = overlap(5, [("trained", [Example("One, two three! four FIVE six", ("seven",))])], rows)
    assert found.flagged == (0,)
    assert found.trained == ("trained",)
    assert found.rows == 3


def test_short_rows_must_be_equal_as_a_whole():
    rows = [
        Example("Past of: walk?", ("walked",)),
        Example("past of walk", ("went",)),
        Example("walk", ("walked",)),
    ]
    assert overlap(13, [("trained", [Example("past of walk", ("walked",))])], rows).flagged == (0,)


def test_answers_count_and_later_tasks_are_named():
    trained = [
        ("first", [Example("a b c", ("d",))]),
        ("second", [Example("x y", ("z",)), Example("b c", ("d",))]),
    ]
    rows = [Example("w x y", ("z",)), Example("b c d e", ("f",))]
    assert overlap(3, trained, rows).trained == ("first", "second")


def test_every_task_that_holds_a_run_is_named_and_the_tasks_own_is_passed_over():
    shared = [Example("a b c", ("d",))]
    trained = [("held", shared), ("other", shared), ("third", [Example("x y", ("z",))])]
    rows = [Example("a b c", ("e",)), Example("w x y", ("z",))]
    assert overlap(3, trained, rows).trained == ("held", "other", "third")
    found = overlap(3, trained, rows, own="held")
    assert (found.flagged, found.trained) == ((0, 1), ("other", "third"))
    assert overlap(3, [("held", shared)], rows, own="held").flagged == ()


def test_measured_tasks_are_told_apart():
    found = Overlaps(3)
    found.measured("one", [Example("a b c", ("d",)), Example("l m n", ("o",))], own="trained")
    found.measured("two", [Example("x", ("y",)), Example("a b c", ("d",))])
    found.trained("trained", [Example("l m n", ("o",)), Example("a b c", ("d",))])
    assert [(o.task, o.rows, o.flagged, o.trained) for o in found.found()] == [
        ("one", 2, (), ()),
        ("two", 2, (1,), ("trained",)),
    ]


def test_a_tasks_own_prompt_is_passed_over():
    prompt = "is the following sentence plausible or not"
    trained = [("trained", [Example(f"{prompt} cats bark", ("no",))])]
    rows = [Example(f"{prompt} number {i} of them", ("yes",)) for i in range(40)]
    assert overlap(5, trained, rows).flagged == ()
    few = [*rows[:39], Example("well is the following sentence plausible", ("x",))]
    assert overlap(5, trained, few).flagged == ()


def test_runs_of_a_text():
    assert len(runs("a b c d", 3)) == 2
    assert len(runs("a b", 3)) == 1
    assert runs(" ... ", 3) == []
    assert runs("A b, C", 3) == runs("a B c", 3)
