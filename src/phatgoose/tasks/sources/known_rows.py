"""Rows as their authors published them → rows as the Hub has them, which is what promptsource's templates read.

SuperGLUE's JSONL names labels by words or as booleans, RTE under GLUE's columns, ANLI's context is the Hub's premise, WSC's spans are
nested. A row that is in the Hub's form already comes back as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_WORDS = {
    "super_glue/rte": ("entailment", "not_entailment"),
    "super_glue/cb": ("entailment", "contradiction", "neutral"),
    "super_glue/wic": ("false", "true"),
    "super_glue/wsc.fixed": ("false", "true"),
    "anli": ("e", "n", "c"),
}

Row = dict[str, Any]


def normalised(dataset: str, row: Mapping[str, Any]) -> Row:
    """`row` of `dataset` (promptsource's name) with the Hub's column names and label numbers."""
    found = dict(row)
    if dataset in _COLUMNS:
        _COLUMNS[dataset](found)
    label = found.get("label")
    if dataset in _WORDS and isinstance(label, str | bool):
        word = str(label).lower()
        found["label"] = _WORDS[dataset].index(word) if word in _WORDS[dataset] else label
    return found


def _rte(row: Row) -> None:
    _rename(row, sentence1="premise", sentence2="hypothesis")


def _anli(row: Row) -> None:
    _rename(row, context="premise")


def _wsc(row: Row) -> None:
    if isinstance(row.get("target"), Mapping):
        row.update(row.pop("target"))


def _rename(row: Row, **names: str) -> None:
    for old, new in names.items():
        if old in row and new not in row:
            row[new] = row.pop(old)


_COLUMNS: dict[str, Callable[[Row], None]] = {
    "super_glue/rte": _rte,
    "anli": _anli,
    "super_glue/wsc.fixed": _wsc,
}
