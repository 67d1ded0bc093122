"""Contamination: shared runs of words are found, prompts that a task shows in every row are not."""

from __future__ import annotations

import pytest

from phatgoose.records import Example, Task
from phatgoose.tasks.overlap import Seen, runs


def task(rows):
    return Task("held", (), (), tuple(rows))


def test_a_shared_run_is_found_whatever_its_case_and_marks():
    seen = Seen(5)
    seen.add("trained", [Example("One, two three! four FIVE six", ("seven",))])
    rows = [
        Example("zero one two three four five", ("x",)),
        Example("one two three four 5", ("x",)),
        Example("a b", ("c",)),
    ]
    found = seen.overlap(task(rows), rows)
    assert found.flagged == (0,)
    assert found.trained == ("trained",)
    assert found.share == pytest.approx(1 / 3)


def test_short_rows_must_be_equal_as_a_whole():
    seen = Seen(13)
    seen.add("trained", [Example("past of walk", ("walked",))])
    rows = [
        Example("Past of: walk?", ("walked",)),
        Example("past of walk", ("went",)),
        Example("walk", ("walked",)),
    ]
    assert seen.overlap(task(rows), rows).flagged == (0,)


def test_answers_count_and_later_tasks_are_named():
    seen = Seen(3)
    seen.add("first", [Example("a b c", ("d",))])
    seen.add("second", [Example("x y", ("z",)), Example("b c", ("d",))])
    rows = [Example("w x y", ("z",)), Example("b c d e", ("f",))]
    assert seen.overlap(task(rows), rows).trained == ("first", "second")


def test_every_task_that_holds_a_run_is_named_and_the_tasks_own_is_passed_over():
    seen = Seen(3)
    for name in ("held", "other", "third"):
        seen.add(name, [Example("a b c", ("d",))] if name != "third" else [Example("x y", ("z",))])
    rows = [Example("a b c", ("e",)), Example("w x y", ("z",))]
    assert seen.overlap(task(rows), rows).trained == ("held", "other", "third")
    found = seen.overlap(task(rows), rows, own="held")
    assert (found.flagged, found.trained) == ((0, 1), ("other", "third"))
    alone = Seen(3)
    alone.add("held", [Example("a b c", ("d",))])
    assert alone.overlap(task(rows), rows, own="held").flagged == ()


def test_a_tasks_own_prompt_is_passed_over():
    prompt = "is the following sentence plausible or not"
    seen = Seen(5)
    seen.add("trained", [Example(f"{prompt} cats bark", ("no",))])
    rows = [Example(f"{prompt} number {i} of them", ("yes",)) for i in range(40)]
    assert seen.overlap(task(rows), rows).flagged == ()
    few = [*rows[:39], Example("well is the following sentence plausible", ("x",))]
    assert seen.overlap(task(few), few).flagged == ()


def test_runs_of_a_text():
    assert len(runs("a b c d", 3)) == 2
    assert len(runs("a b", 3)) == 1
    assert runs(" ... ", 3) == []
    assert runs("A b, C", 3) == runs("a B c", 3)
