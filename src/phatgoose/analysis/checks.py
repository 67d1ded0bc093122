"""Check results.json before a page is made of it. `shape.json` says what it must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from phatgoose.errors import EvaluationError

SHAPE: dict[str, Any] = json.loads(files(__package__).joinpath("shape.json").read_text(encoding="utf-8"))
"""What `report` takes. A key with a question mark may be left out; further keys are kept in the data and not shown.

"any name" stands for keys of the results' own; "task", "group", "system" and keys of "any" of them name one that is
there.
"""
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "number": (int, float),
    "number or null": (int, float, type(None)),
    "share": (int, float),
    "anything": (object,),
}
"""Others are texts."""

LEVELS = ("good", "look")
KINDS = ("base", "single", "static", "control", "router", "oracle")


def checked(results: Mapping[str, Any], *, empty: bool = False) -> dict[str, Any]:
    """A plain copy of `results`, as JSON would give it back. `empty`: tasks and systems may be empty lists.

    Raises:
        EvaluationError: if something is missing, of the wrong kind, not finite, or names a task or system that isn't
            there; the message says where.
    """
    try:
        data = json.loads(json.dumps(results, allow_nan=False, default=_plain))
    except (TypeError, ValueError, RecursionError) as cause:
        raise EvaluationError(f"results can't be written as JSON: {cause}") from cause
    _shape(data, SHAPE, "results", {})
    names = {
        "task": _unique(data["tasks"], "tasks", empty),
        "system": _unique(data["systems"], "systems", empty),
        "group": list(dict.fromkeys(task["group"] for task in data["tasks"])),
        "kind of system": KINDS,
        "level of health": LEVELS,
    }
    _unique(data.get("experts", []), "experts", True)
    _shape(data, SHAPE, "results", names)
    _numbers(data)
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _shape(value: Any, shape: Any, where: str, names: Mapping[str, Sequence[str]]) -> None:
    """Refuses a value of another shape, or one that names something that isn't among `names` of its kind."""
    if isinstance(shape, list):
        _expect(value, (list,), where)
        for number, item in enumerate(value):
            _shape(item, shape[0], f"{where}[{number}]", names)
    elif isinstance(shape, dict):
        _expect(value, (dict,), where)
        first = next(iter(shape))
        if first.startswith("any "):
            for key in value:
                _known(key, first.removeprefix("any "), where, names)
            shape = dict.fromkeys(value, shape[first])
        for key, inner in shape.items():
            name = key.removesuffix("?") if key not in value else key
            if name in value:
                _shape(value[name], inner, f"{where}[{name!r}]", names)
            elif not key.endswith("?"):
                raise EvaluationError(
                    f"{where} lacks {key!r}; it has {', '.join(map(repr, value)) or 'nothing'}."
                )
    else:
        _expect(value, _TYPES.get(shape, (str,)), where)
        _known(value, shape, where, names)
        if shape == "share" and not 0 <= value <= 1.001:
            raise EvaluationError(f"{where} should lie between 0 and 1, got {value}.")


def _expect(value: Any, kinds: tuple[type, ...], where: str) -> None:
    if kinds != (object,) and (not isinstance(value, kinds) or isinstance(value, bool)):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise EvaluationError(f"{where} should be {wanted}, got {_short(value)}.")


def _known(name: Any, kind: str, where: str, names: Mapping[str, Sequence[str]]) -> None:
    if kind in names and name not in names[kind]:
        shown = ", ".join(_short(known) for known in names[kind][:12])
        raise EvaluationError(f"{where}: the {kind} {_short(name)} isn't there; known: {shown}.")


def _numbers(data: dict[str, Any]) -> None:
    """Checks that means lie in their intervals, and that tables of layers are whole."""
    for system in data["systems"]:
        where = f"results['systems'], {system['name']!r}"
        for task, score in system["scores"].items():
            _interval(score, f"{where}: score of {task!r}")
        for group, score in system.get("groups", {}).items():
            _interval(score, f"{where}: mean of {group!r}")
    for task, profile in data.get("layers", {}).items():
        layers, experts = len(profile["layers"]), len(profile["experts"])
        if [len(row) for row in profile["shares"]] != [experts] * layers:
            raise EvaluationError(
                f"results['layers'][{task!r}] should have {layers} rows of {experts} shares: one row a layer, "
                "one share an expert."
            )


def _unique(items: list[dict[str, Any]], part: str, empty: bool) -> list[str]:
    names = [item["name"] for item in items]
    if not names and not empty:
        raise EvaluationError(f"results[{part!r}] is empty: there is nothing to show.")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise EvaluationError(f"results[{part!r}] has {_short(twice[0])} more than once.")
    return names


def _interval(score: dict[str, Any], where: str) -> None:
    slack = 1e-9  # a mean of means may miss 0 or 1 by a rounding
    if not -slack <= score["mean"] <= 1 + slack or not -slack <= score["low"] <= score["high"] <= 1 + slack:
        raise EvaluationError(
            f"{where} should be a mean with 0 ≤ low ≤ high ≤ 1, got {score['mean']} ({score['low']} to "
            f"{score['high']})."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
