"""Rows on which lm-evaluation-harness and we must agree, whichever way it is connected."""

from __future__ import annotations

from phatgoose.records import Example

WORDS = ["red", "blue and green", "the quick fox", "no", "entailment of the dog", "x"]
ROWS = tuple(
    Example(
        f"row {i}: which of them is it" + " lazy" * (i % 4) + "?",
        (WORDS[i % 3],),
        (*WORDS[i % 3 :], *WORDS[: i % 3]),
    )
    for i in range(23)
)
