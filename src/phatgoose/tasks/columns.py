"""A row of named columns → an Example, by column names, templates and literal choices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.records import Example
from phatgoose.registry import unknown
from phatgoose.tasks.examples import Dropped, make_example
from phatgoose.tasks.spec import TaskSpec

OPTIONS = ("input", "target", "choices", "answer_index", "answer_base", "values")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@dataclass(frozen=True)
class Columns:
    """Which columns of a source's rows make an Example. docs/tasks.md has the forms."""

    input: str = "input"
    """Column or template of the prompt."""
    target: str | None = None
    """Column or template of the answer; None if `answer_index` is enough."""
    choices: str | None = None
    """Column, `names`, or literals separated by |."""
    answer_index: str | None = None
    """Column of the right choice's index or letter."""
    answer_base: int = 0
    """What the first choice's index is."""
    values: dict[str, str] = field(default_factory=dict)
    """Raw target values → answers; empty means as they are."""

    @staticmethod
    def from_spec(spec: TaskSpec, default: Columns) -> Columns:
        """`default`, changed by the spec's options."""
        o = spec.options
        values = {}
        for pair in o["values"].split("|") if "values" in o else []:
            raw, colon, text = pair.partition(":")
            if not colon:
                raise TaskError(f"{spec.text}: values= should read raw:answer|raw:answer, got {pair!r}.")
            values[raw.strip()] = text.strip()
        base = o.get("answer_base", "0")
        if base not in ("0", "1"):
            raise TaskError(f"{spec.text}: answer_base must be 0 or 1, got {base!r}.")
        target = o.get("target", None if "answer_index" in o else default.target)
        named = {key: o[key] for key in ("input", "choices", "answer_index") if key in o}
        return replace(default, **named, target=target, answer_base=int(base), values=values)

    def columns_read(self) -> set[str]:
        """Columns that these settings read; of nested ones also the top-level column."""
        names = [
            n for part in (self.input, self.target, self.answer_index) if part for n in _columns_in(part)
        ]
        if self.choices and "|" in self.choices:
            names += [n for part in self.choices.split("|") if "{" in part for n in _columns_in(part)]
        elif self.choices and self.choices != "names":
            names += _columns_in(self.choices)
        return {n for name in names for n in (name, name.split(".")[0])}


def to_example(
    row: Mapping[str, Any], columns: Columns, labels: Mapping[str, Sequence[str]] | None = None
) -> Example:
    """The Example of a row. `labels` holds the names of columns that store a class label as a number.

    Raises:
        Dropped: the row has no answer (None, or the label -1 of a public test split).
        ValueError: the row breaks a rule; the message says which.
        UnknownName: a column isn't there.
    """
    labels = labels or {}
    prompt = _fill(row, columns.input, labels)
    if prompt is None:
        raise ValueError(f"no text in {columns.input!r}")
    choices = _choices(row, columns, labels)
    answers: list[str] | None = None
    if columns.target is not None:
        answers = [_map_answer(a, columns.values) for a in _answers(row, columns.target, labels)]
    if columns.answer_index is not None:
        if choices is None:
            raise ValueError("an answer_index needs choices")
        right = choices[_choice_index(_value(row, columns.answer_index), columns.answer_base, len(choices))]
        if answers is not None and right.strip() not in [a.strip() for a in answers]:
            raise ValueError(f"answer_index says {right!r}, the target says {answers}")
        answers = answers or [right]
    if answers is None:
        raise ValueError("no target")
    return make_example(prompt, answers, choices, keep_line_end=True)


def _columns_in(part: str) -> list[str]:
    return [m[1] for m in _FIELD.finditer(part) if m[1]] if "{" in part else [part]


def _value(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise unknown("column", path, row)
        value = value[key]
    return value


def _fill(row: Mapping[str, Any], part: str, labels: Mapping[str, Sequence[str]]) -> str | None:
    """A template with its columns filled in, or a column's text; None if the column holds nothing."""
    if "{" not in part:
        return _to_text(_value(row, part), labels.get(part))

    def fill(match: re.Match[str]) -> str:
        if not match[1]:
            if len(match[0]) == 1:
                raise ValueError(
                    f"unbalanced {match[0]} in template {part!r} (write {match[0] * 2} for a brace)"
                )
            return match[0][0]
        text = _to_text(_value(row, match[1]), labels.get(match[1]))
        if text is None:
            raise ValueError(f"no text in {match[1]!r}")
        return text

    return _FIELD.sub(fill, part)


def _to_text(value: Any, names: Sequence[str] | None = None) -> str | None:
    if value is None:
        return None
    if names is not None and isinstance(value, int):
        if value == -1:
            raise Dropped("unlabelled", "label -1")
        return names[value]
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"expected text or a number, got {type(value).__name__}")


def _answers(row: Mapping[str, Any], part: str, labels: Mapping[str, Sequence[str]]) -> list[str]:
    value = None if "{" in part else _value(row, part)
    texts = (
        [_to_text(v, labels.get(part)) for v in value]
        if isinstance(value, list | tuple)
        else [_fill(row, part, labels)]
    )
    if not texts or any(t is None for t in texts):
        raise Dropped("unlabelled", f"no answer in {part!r}")
    return [t for t in texts if t is not None]


def _map_answer(answer: str, values: Mapping[str, str]) -> str:
    if not values:
        return answer
    if answer.strip() not in values:
        raise unknown("raw target value", answer, values, "Name it in values=.")
    return values[answer.strip()]


def _choices(
    row: Mapping[str, Any], columns: Columns, labels: Mapping[str, Sequence[str]]
) -> list[str] | None:
    if columns.choices is None:
        return None
    if "|" in columns.choices:
        texts = [_fill(row, part, labels) if "{" in part else part for part in columns.choices.split("|")]
    elif columns.choices == "names":
        column = columns.answer_index or columns.target or ""
        if column not in labels:
            raise ValueError(f"choices=names needs a class label column as target, {column!r} is none")
        texts = [_map_answer(name, columns.values) for name in labels[column]]
    else:
        value = _value(row, columns.choices)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise ValueError(f"choices in {columns.choices!r} are {type(value).__name__}, expected a list")
        texts = [_to_text(v) for v in value]
    if any(t is None for t in texts):
        raise ValueError("empty choice")
    return [t for t in texts if t is not None]


def _choice_index(value: Any, base: int, count: int) -> int:
    if value is None or value == "" or (value == -1 and value is not True):
        raise Dropped("unlabelled", "no answer_index")
    if isinstance(value, str) and re.fullmatch(r"[A-Z]", value.strip()):
        index = ord(value.strip()) - ord("A")
    else:
        try:
            index = int(value) - base
        except (TypeError, ValueError):
            raise ValueError(f"answer_index {value!r} is neither a number nor a letter") from None
    if not 0 <= index < count:
        raise ValueError(f"answer_index {value!r} points outside the {count} choices")
    return index
