"""Scores held to the definition: one plain forward an answer."""

import pytest

from phatgoose.evaluation.rank import score_choice_plainly


def assert_plain(model, rows, scores, within=1e-5):
    """`scores` are those of every answer of `rows`, by plain forwards, up to `within`, absolute or relative."""
    for row, found in zip(rows, scores, strict=True):
        expected = [score_choice_plainly(model, row.prompt, answer) for answer in row.answers]
        assert found == pytest.approx(expected, abs=within, rel=within)
