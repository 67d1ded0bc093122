"""A row of named columns → an Example, by column names, templates and literal choices."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.records import Example
from phatgoose.registry import unknown
from phatgoose.tasks.examples import Dropped, make_example
from phatgoose.tasks.spec import TaskSpec

OPTIONS = (
    "input",
    "target",
    "choices",
    "draw",
    "answer_index",
    "answer_base",
    "answer_labels",
    "values",
    "others",
)
OTHER_ANSWER = "other_answer"
"""The reason under which rows are counted that `others=drop` leaves out."""
_RANGES = {">=": operator.ge, "<=": operator.le}
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
    answer_labels: str | None = None
    """Column of the labels of the choices, one of which the `answer_index` column holds."""
    values: dict[str, str] = field(default_factory=dict)
    """Raw target values, or ranges of them (">=0.8") → answers; empty means as they are."""
    drop_others: bool = False
    """Drop rows whose raw target value isn't among `values`, in place of refusing them."""
    draw: int | None = None
    """How many of a row's choices to keep, in an order of their own; None: all, as they are."""

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
        if o.get("others", "drop") != "drop" or ("others" in o and not values):
            raise TaskError(
                f"{spec.text}: others=drop goes with values=, and is the only value that others= has."
            )
        base = o.get("answer_base", "0")
        if base not in ("0", "1"):
            raise TaskError(f"{spec.text}: answer_base must be 0 or 1, got {base!r}.")
        target = o.get("target", None if "answer_index" in o else default.target)
        draw = spec.count("draw", 1) if "draw" in o else None
        made = replace(
            default,
            input=o.get("input", default.input),
            target=target,
            choices=o.get("choices", default.choices),
            answer_index=o.get("answer_index", default.answer_index),
            answer_base=int(base),
            answer_labels=o.get("answer_labels"),
            values=values,
            drop_others="others" in o,
            draw=draw,
        )
        if draw is not None and (draw < 2 or made.choices is None):
            raise TaskError(f"{spec.text}: draw= needs choices=, and a number of at least 2.")
        if made.answer_labels is not None and made.answer_index is None:
            raise TaskError(f"{spec.text}: answer_labels= needs answer_index=.")
        return made

    def columns_read(self) -> set[str]:
        """Columns that these settings read; of nested ones also the top-level column."""
        parts = (self.input, self.target, self.answer_index, self.answer_labels)
        names = [n for part in parts if part for n in _columns_in(part)]
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
    prompt = _prompt(row, columns, labels, [])
    choices = _choices(row, columns, labels)
    answers: list[str] | None = None
    if columns.target is not None:
        answers = [_map_answer(a, columns) for a in _answers(row, columns.target, labels)]
    if columns.answer_index is not None:
        if choices is None:
            raise ValueError("an answer_index needs choices")
        right = choices[_right_choice(row, columns, len(choices))]
        if answers is not None and right.strip() not in [a.strip() for a in answers]:
            raise ValueError(f"answer_index says {right!r}, the target says {answers}")
        answers = answers or [right]
    if answers is None:
        raise ValueError("no target")
    if choices is not None and columns.draw is not None:
        choices = _drawn(choices, answers, columns.draw, prompt)
    if "{choices|" in columns.input:
        prompt = _prompt(row, columns, labels, choices)
    return make_example(prompt, answers, choices, keep_line_end=True)


def _prompt(
    row: Mapping[str, Any],
    columns: Columns,
    labels: Mapping[str, Sequence[str]],
    choices: Sequence[str] | None,
) -> str:
    prompt = _fill(row, columns.input, labels, choices)
    if prompt is None:
        raise ValueError(f"no text in {columns.input!r}")
    return prompt


def _drawn(choices: Sequence[str], answers: Sequence[str], most: int, prompt: str) -> list[str]:
    """The right choices and others, `most` together, drawn and ordered by hashes of prompt and choice.

    Two hashes: of one, the right choice would stand where those that were drawn by it don't.
    """

    def rank(choice: str, use: str) -> bytes:
        return hashlib.sha256(f"{use}\n{prompt}\n{choice}".encode()).digest()

    right = {a.strip() for a in answers}
    others = sorted({c.strip() for c in choices} - right, key=lambda c: rank(c, "draw"))
    kept = [*right, *others[: max(0, most - len(right))]]
    return sorted(kept, key=lambda c: rank(c, "order"))


def _columns_in(part: str) -> list[str]:
    if "{" not in part:
        return [part]
    return [m[1].partition("|")[0] for m in _FIELD.finditer(part) if m[1] and not m[1].startswith("choices|")]


def _value(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise unknown("column", path, row)
        value = value[key]
    return value


def _fill(
    row: Mapping[str, Any],
    part: str,
    labels: Mapping[str, Sequence[str]],
    choices: Sequence[str] | None = None,
) -> str | None:
    """A template with its columns filled in, or a column's text; None if the column holds nothing.

    `{column|separator}` is a column's list, joined; `{choices|separator}` joins `choices`.
    """
    if "{" not in part:
        return _to_text(_value(row, part), labels.get(part))

    def fill(match: re.Match[str]) -> str:
        if not match[1]:
            if len(match[0]) == 1:
                raise ValueError(
                    f"unbalanced {match[0]} in template {part!r} (write {match[0] * 2} for a brace)"
                )
            return match[0][0]
        name, bar, separator = match[1].partition("|")
        if bar and name == "choices" and choices is not None:
            return separator.join(choices)
        if bar:
            return _joined(_value(row, name), separator, name)
        text = _to_text(_value(row, match[1]), labels.get(match[1]))
        if text is None:
            raise ValueError(f"no text in {match[1]!r}")
        return text

    return _FIELD.sub(fill, part)


def _joined(values: Any, separator: str, name: str) -> str:
    """The texts of a list, joined. A list in it, as a triple in a list of triples, is joined by " | "."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name!r} is {type(values).__name__}, expected a list to join")
    texts = [_joined(v, " | ", name) if isinstance(v, list | tuple) else _to_text(v) for v in values]
    if any(text is None for text in texts):
        raise ValueError(f"no text in {name!r}")
    return separator.join(text for text in texts if text is not None)


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


def _map_answer(answer: str, columns: Columns) -> str:
    """What a raw target value means. Raises Dropped for one that `values` doesn't name, if `drop_others`."""
    raw, values = answer.strip(), columns.values
    if not values:
        return answer
    if raw in values:
        return values[raw]
    for bound, text in values.items():
        if bound[:2] in _RANGES and _in_range(raw, bound):
            return text
    if columns.drop_others:
        raise Dropped(OTHER_ANSWER, f"{raw!r} isn't in values=")
    raise unknown(
        "raw target value", answer, values, "Name it in values=, or leave out its rows by others=drop."
    )


def _in_range(raw: str, bound: str) -> bool:
    try:
        return bool(_RANGES[bound[:2]](float(raw), float(bound[2:])))
    except ValueError:
        raise ValueError(f"values= compares with {bound!r}, and {raw!r} or the bound is no number") from None


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
        texts = list(_mapped_names(labels[column], columns))
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


def _mapped_names(names: Sequence[str], columns: Columns) -> Iterator[str]:
    for name in names:
        with contextlib.suppress(Dropped):  # a class whose rows are left out is no choice either
            yield _map_answer(name, columns)


def _right_choice(row: Mapping[str, Any], columns: Columns, count: int) -> int:
    """The right choice's number, from 0."""
    assert columns.answer_index is not None
    value = _value(row, columns.answer_index)
    if columns.answer_labels is None or value is None:
        return _choice_index(value, columns.answer_base, count)
    known = _value(row, columns.answer_labels)
    if not isinstance(known, list | tuple) or len(known) != count:
        raise ValueError(f"{columns.answer_labels!r} isn't a list of a label for each of the {count} choices")
    if value == "":
        raise Dropped("unlabelled", "no answer_index")
    if value not in known:
        raise ValueError(f"answer_index {value!r} is not among the labels {list(known)}")
    return known.index(value)


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
