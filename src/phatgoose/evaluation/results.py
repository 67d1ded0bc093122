"""Scores as JSON and back, so that finished evaluations can be stored, compared and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from phatgoose.errors import EvaluationError
from phatgoose.records import SPLITS, Prediction, Scores, TaskScore

FORMAT = 1


def scores_to_json(scores: Scores) -> dict[str, Any]:
    """`scores` with every prediction, as plain dicts and lists; `scores_from_json` gives back an equal record."""
    return {"format": FORMAT, **asdict(scores)}


def scores_from_json(data: Any) -> Scores:
    """The record that `scores_to_json` wrote.

    Raises:
        EvaluationError: if `data` is of another format, or a field is missing, unknown or of the wrong type.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise EvaluationError(f"these are not scores of format {FORMAT}: found {found!r}.")
    content = {key: value for key, value in data.items() if key != "format"}
    return _record(Scores, {**content, "tasks": tuple(_task(t) for t in _list(content, "tasks", "scores"))})


def _task(data: Any) -> TaskScore:
    predictions = tuple(_prediction(p) for p in _list(data, "predictions", "a task's score"))
    groups = tuple(_list(data, "groups", "a task's score")) if "groups" in data else ()
    if not all(isinstance(g, int) for g in groups):
        raise EvaluationError("a task's score has groups that are no whole numbers.")
    task = _record(TaskScore, {**data, "predictions": predictions, "groups": groups})
    if task.split not in SPLITS:
        raise EvaluationError(
            f"task {task.task!r}: unknown split {task.split!r}, known: {', '.join(SPLITS)}."
        )
    if task.rows != len(predictions):
        raise EvaluationError(
            f"task {task.task!r} says {task.rows} rows and holds {len(predictions)} predictions."
        )
    if groups and len(groups) != task.rows:
        raise EvaluationError(f"task {task.task!r} has groups for {len(groups)} of {task.rows} rows.")
    return task


def _prediction(data: Any) -> Prediction:
    if isinstance(data, Mapping) and isinstance(data.get("choice_scores"), list):
        data = {**data, "choice_scores": tuple(data["choice_scores"])}
    return _record(Prediction, data)


def _list(data: Any, key: str, what: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(data, Mapping) or not isinstance(data.get(key), list | tuple):
        raise EvaluationError(f"{what} must be an object with a list under {key!r}.")
    return data[key]


_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "int": int, "float": (int, float)}


def _record(kind: type[Any], data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise EvaluationError(f"a {kind.__name__} must be an object, found {type(data).__name__}.")
    for field in fields(kind):
        expected = _TYPES.get(str(field.type))
        if field.name in data and expected and not isinstance(data[field.name], expected):
            raise EvaluationError(
                f"{kind.__name__}.{field.name} must be a {field.type}, found {data[field.name]!r}."
            )
    try:
        return kind(**data)
    except TypeError as error:
        raise EvaluationError(
            f"a {kind.__name__} can't be made of the fields {', '.join(map(str, data))}: {error}"
        ) from None
