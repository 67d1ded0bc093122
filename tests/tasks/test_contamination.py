"""Contamination: shared runs of words are found, prompts that a task shows in every row are not."""

from __future__ import annotations

from phatgoose.records import Example
from phatgoose.tasks.contamination import ContaminationCheck, hash_runs


def overlap(n, trained, rows, own=None):
    """What is found of one measured task, trained: (name, rows) in their order."""
    found = ContaminationCheck(n)
    found.add_held_out("held", rows, own=own)
    for name, examples in trained:
        found.compare(name, examples)
    (one,) = found.results
    return one


def test_a_shared_run_is_found_whatever_its_case_and_marks():
    rows = [
        Example("zero one two three four five", ("x",)),
        Example("one two three four 5", ("x",)),
        Example("a b", ("c",)),
    ]
    found = overlap(5, [("trained", [Example("One, two three! four FIVE six", ("seven",))])], rows)
    assert found.flagged_rows == {0}
    assert list(found.shared_with) == ["trained"]
    assert found.rows == 3


def test_short_rows_must_be_equal_as_a_whole():
    rows = [
        Example("Past of: walk?", ("walked",)),
        Example("past of walk", ("went",)),
        Example("walk", ("walked",)),
    ]
    assert overlap(13, [("trained", [Example("past of walk", ("walked",))])], rows).flagged_rows == {0}


def test_answers_count_and_later_tasks_are_named():
    trained = [
        ("first", [Example("a b c", ("d",))]),
        ("second", [Example("x y", ("z",)), Example("b c", ("d",))]),
    ]
    rows = [Example("w x y", ("z",)), Example("b c d e", ("f",))]
    assert list(overlap(3, trained, rows).shared_with) == ["first", "second"]


def test_every_task_that_holds_a_run_is_named_and_the_tasks_own_is_passed_over():
    shared = [Example("a b c", ("d",))]
    trained = [("held", shared), ("other", shared), ("third", [Example("x y", ("z",))])]
    rows = [Example("a b c", ("e",)), Example("w x y", ("z",))]
    assert list(overlap(3, trained, rows).shared_with) == ["held", "other", "third"]
    found = overlap(3, trained, rows, own="held")
    assert (found.flagged_rows, list(found.shared_with)) == ({0, 1}, ["other", "third"])
    assert overlap(3, [("held", shared)], rows, own="held").flagged_rows == set()


def test_measured_tasks_are_told_apart():
    found = ContaminationCheck(3)
    found.add_held_out("one", [Example("a b c", ("d",)), Example("l m n", ("o",))], own="trained")
    found.add_held_out("two", [Example("x", ("y",)), Example("a b c", ("d",))])
    found.compare("trained", [Example("l m n", ("o",)), Example("a b c", ("d",))])
    assert [(o.task, o.rows, o.flagged_rows, list(o.shared_with)) for o in found.results] == [
        ("one", 2, set(), []),
        ("two", 2, {1}, ["trained"]),
    ]


def test_a_tasks_own_prompt_is_passed_over():
    prompt = "is the following sentence plausible or not"
    trained = [("trained", [Example(f"{prompt} cats bark", ("no",))])]
    rows = [Example(f"{prompt} number {i} of them", ("yes",)) for i in range(40)]
    assert overlap(5, trained, rows).flagged_rows == set()
    few = [*rows[:39], Example("well is the following sentence plausible", ("x",))]
    assert overlap(5, trained, few).flagged_rows == set()


def test_runs_of_a_text():
    assert len(hash_runs("a b c d", 3)) == 2
    assert len(hash_runs("a b", 3)) == 1
    assert hash_runs(" ... ", 3) == []
    assert hash_runs("A b, C", 3) == hash_runs("a B c", 3)
