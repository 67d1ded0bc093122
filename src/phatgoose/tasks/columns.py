"""From a row of named columns to an Example: column names, templates with {column}, literal choices.

The options that `jsonl:` and `hf:` specs share (see docs of each source for its own):

    input=       a column, or a template such as `{premise} Question: {hypothesis}?` ({{ and }} for braces)
    target=      a column (text, number, or a list of acceptable answers) or a template
    choices=     a column holding a list; `names` for the label names of the target column (hf: only); or choices
                 separated by |, each a text or template: `yes|no`, `{option1}|{option2}`
    answer_index= a column holding the right choice's place (or its letter, A first); answer_base=1 if counted from 1
    values=      what raw target values stand for: `e:yes|n:maybe|c:no`

A dot reaches into a nested column: `choices.text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.records import Example
from phatgoose.registry import unknown
from phatgoose.tasks.spec import TaskSpec

OPTIONS = ("input", "target", "choices", "answer_index", "answer_base", "values")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class Unlabelled(ValueError):
    """The row has no answer (None, or the label -1 of a public test split)."""


def trimmed(prompt: str) -> str:
    """A prompt without white space at its ends, but for a line break directly behind its text, and what follows that.

    What a template rendered ends so ("…<|im_start|>assistant\n", "### Response:\n"), and the answer begins on the next line.
    """
    text = prompt.strip()
    end = prompt[len(prompt.rstrip()) :]
    return text + end if text and end.startswith("\n") else text


def make_example(
    prompt: str,
    targets: Iterable[str],
    choices: Iterable[str] | None = None,
    *,
    keep_line_end: bool = False,
) -> Example:
    """An Example with white space stripped from prompt, targets and choices, and repeated ones dropped.

    Args:
        keep_line_end: as `trimmed` does.

    Raises:
        ValueError: saying which of its rules the row breaks.
    """
    prompt = trimmed(prompt) if keep_line_end else prompt.strip()
    targets, choices = list(targets), None if choices is None else list(choices)
    try:
        "".join([prompt, *targets, *(choices or ())]).encode()
    except UnicodeEncodeError as cause:
        raise ValueError(f"text that isn't valid Unicode ({cause.reason})") from cause
    answers = tuple(dict.fromkeys(t.strip() for t in targets))
    if not prompt:
        raise ValueError("empty input")
    if not answers:
        raise ValueError("no target")
    if any(not a for a in answers):
        raise ValueError("empty target")
    if choices is None:
        return Example(prompt, answers)
    options = tuple(dict.fromkeys(c.strip() for c in choices))
    if any(not c for c in options):
        raise ValueError("empty choice")
    if len(options) < 2:
        raise ValueError("fewer than two different choices")
    if missing := [a for a in answers if a not in options]:
        raise ValueError(f"target {missing[0]!r} is not among the choices {list(options)}")
    return Example(prompt, answers, options)


@dataclass(frozen=True)
class Columns:
    """Where a source's rows keep what an Example needs. See the module's text for the forms."""

    input: str = "input"
    """Column or template of the prompt."""
    target: str | None = None
    """Column or template of the answer; None when `answer_index` says it all."""
    choices: str | None = None
    """Column, `names`, or literals separated by |."""
    answer_index: str | None = None
    """Column of the right choice's index or letter."""
    answer_base: int = 0
    """What the first choice's index is."""
    values: dict[str, str] = field(default_factory=dict)
    """Raw target values → answers; empty means as they are."""

    @staticmethod
    def of(spec: TaskSpec, default: Columns) -> Columns:
        """`default` with what the spec's options say."""
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
        return Columns(
            input=o.get("input", default.input),
            target=target,
            choices=o.get("choices", default.choices),
            answer_index=o.get("answer_index", default.answer_index),
            answer_base=int(base),
            values=values,
        )

    def used(self) -> set[str]:
        """Top-level columns that these settings read."""
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
        Unlabelled: the row has no answer.
        ValueError: the row breaks a rule; the message says which.
        UnknownName: a column isn't there.
    """
    labels = labels or {}
    prompt = _text(row, columns.input, labels)
    if prompt is None:
        raise ValueError(f"no text in {columns.input!r}")
    choices = _choices(row, columns, labels)
    answers: list[str] | None = None
    if columns.target is not None:
        answers = [_mapped(a, columns.values) for a in _answers(row, columns.target, labels)]
    if columns.answer_index is not None:
        if choices is None:
            raise ValueError("an answer_index needs choices")
        right = choices[_index(_value(row, columns.answer_index), columns.answer_base, len(choices))]
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


def _text(row: Mapping[str, Any], part: str, labels: Mapping[str, Sequence[str]]) -> str | None:
    """A template filled in, or a column's text; None where the column holds nothing."""
    if "{" not in part:
        return _plain(_value(row, part), labels.get(part))

    def fill(match: re.Match[str]) -> str:
        if not match[1]:
            if len(match[0]) == 1:
                raise ValueError(
                    f"unbalanced {match[0]} in template {part!r} (write {match[0] * 2} for a brace)"
                )
            return match[0][0]
        text = _plain(_value(row, match[1]), labels.get(match[1]))
        if text is None:
            raise ValueError(f"no text in {match[1]!r}")
        return text

    return _FIELD.sub(fill, part)


def _plain(value: Any, names: Sequence[str] | None = None) -> str | None:
    if value is None:
        return None
    if names is not None and isinstance(value, int):
        if value == -1:
            raise Unlabelled("label -1")
        return names[value]
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"expected text or a number, got {type(value).__name__}")


def _answers(row: Mapping[str, Any], part: str, labels: Mapping[str, Sequence[str]]) -> list[str]:
    value = None if "{" in part else _value(row, part)
    texts = (
        [_plain(v, labels.get(part)) for v in value]
        if isinstance(value, list | tuple)
        else [_text(row, part, labels)]
    )
    if not texts or any(t is None for t in texts):
        raise Unlabelled(f"no answer in {part!r}")
    return [t for t in texts if t is not None]


def _mapped(answer: str, values: Mapping[str, str]) -> str:
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
        texts = [_text(row, part, labels) if "{" in part else part for part in columns.choices.split("|")]
    elif columns.choices == "names":
        column = columns.answer_index or columns.target or ""
        if column not in labels:
            raise ValueError(f"choices=names needs a class label column as target, {column!r} is none")
        texts = [_mapped(name, columns.values) for name in labels[column]]
    else:
        value = _value(row, columns.choices)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise ValueError(f"choices in {columns.choices!r} are {type(value).__name__}, expected a list")
        texts = [_plain(v) for v in value]
    if any(t is None for t in texts):
        raise ValueError("empty choice")
    return [t for t in texts if t is not None]


def _index(value: Any, base: int, count: int) -> int:
    if value is None or value == "" or (value == -1 and value is not True):
        raise Unlabelled("no answer_index")
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
