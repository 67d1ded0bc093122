"""Check results.json before a page is made of it. `shape.json` says what it must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from phatgoose.errors import EvaluationError

SHAPE: dict[str, Any] = json.loads(files(__package__).joinpath("shape.json").read_text(encoding="utf-8"))
"""What `report` takes. A key with a question mark may be left out; further keys are kept in the data and not shown."""
ANY = "any name"
"""In place of keys in `SHAPE`: a name of the results' own."""
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "number": (int, float),
    "number or null": (int, float, type(None)),
    "anything": (object,),
}

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
    _shape(data, SHAPE, "results")
    _names(data, empty)
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _shape(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, list):
        _expect(value, (list,), where)
        for number, item in enumerate(value):
            _shape(item, shape[0], f"{where}[{number}]")
    elif isinstance(shape, dict):
        _expect(value, (dict,), where)
        if ANY in shape:
            shape = dict.fromkeys(value, shape[ANY])
        for key, inner in shape.items():
            name = key.removesuffix("?") if key not in value else key
            if name in value:
                _shape(value[name], inner, f"{where}[{name!r}]")
            elif not key.endswith("?"):
                raise EvaluationError(
                    f"{where} lacks {key!r}; it has {', '.join(map(repr, value)) or 'nothing'}."
                )
    else:
        _expect(value, _TYPES[shape], where)


def _expect(value: Any, kinds: tuple[type, ...], where: str) -> None:
    if kinds != (object,) and (not isinstance(value, kinds) or isinstance(value, bool)):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise EvaluationError(f"{where} should be {wanted}, got {_short(value)}.")


def _names(data: dict[str, Any], empty: bool) -> None:
    """Checks references: every task, group and system that a part mentions exists, once."""
    tasks = _unique(data["tasks"], "tasks", empty)
    systems = _unique(data["systems"], "systems", empty)
    _unique(data.get("experts", []), "experts", True)
    groups = list(dict.fromkeys(t["group"] for t in data["tasks"]))
    for system in data["systems"]:
        where = f"results['systems'], {system['name']!r}"
        if system["kind"] not in KINDS:
            raise EvaluationError(f"{where} is of kind {_short(system['kind'])}; known: {', '.join(KINDS)}.")
        for part, known, kind, what in (
            ("scores", tasks, "task", "score"),
            ("groups", groups, "group", "mean"),
        ):
            for name, score in system.get(part, {}).items():
                _known(name, known, f"{where}: {part}", kind)
                _interval(score, f"{where}: {what} of {name!r}")
    for row in data.get("comparisons", []):
        for side, known, kind in (
            ("group", groups, "group"),
            ("a", systems, "system"),
            ("b", systems, "system"),
        ):
            _known(row[side], known, "results['comparisons']", kind)
    for group in data.get("recovered", {}):
        _known(group, groups, "results['recovered']", "group")
    for expert in data.get("experts", []):
        for line in expert.get("health", []):
            if line["level"] not in LEVELS:
                where = f"results['experts'], {expert['name']!r}"
                raise EvaluationError(
                    f"{where}: health is {_short(line['level'])}; known: {', '.join(LEVELS)}."
                )
    for task, profile in data.get("layers", {}).items():
        _known(task, tasks, "results['layers']", "task")
        where, rows = f"results['layers'][{task!r}]", profile["shares"]
        layers, experts = len(profile["layers"]), len(profile["experts"])
        if len(rows) != layers or any(len(row) != experts for row in rows):
            raise EvaluationError(
                f"{where} should have {layers} rows of {experts} shares, one row a layer, one share an expert."
            )
        for share in (share for row in rows for share in row):
            _share(share, f"{where}: every share")
    for task, shares in data.get("shares", {}).items():
        _known(task, tasks, "results['shares']", "task")
        for expert, share in shares.items():
            _share(share, f"results['shares'][{task!r}][{expert!r}]")


def _share(share: float, where: str) -> None:
    if not 0 <= share <= 1.001:
        raise EvaluationError(f"{where} should lie between 0 and 1, got {share}.")


def _unique(items: list[dict[str, Any]], part: str, empty: bool) -> list[str]:
    names = [item["name"] for item in items]
    if not names and not empty:
        raise EvaluationError(f"results[{part!r}] is empty: there is nothing to show.")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise EvaluationError(f"results[{part!r}] has {_short(twice[0])} more than once.")
    return names


def _known(name: str, known: list[str], where: str, kind: str) -> None:
    if name not in known:
        shown = ", ".join(_short(k) for k in known[:12])
        raise EvaluationError(f"{where} name the {kind} {_short(name)}, which isn't there; known: {shown}.")


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
