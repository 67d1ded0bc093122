"""Rows of any source → Examples: the rules that all rows obey."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from phatgoose.errors import TaskError
from phatgoose.records import Example

_Row = TypeVar("_Row")


class Dropped(ValueError):
    """A well-formed row that can't be used. A task's source counts such rows under `reason`, a word."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


def strip_prompt(prompt: str) -> str:
    """A prompt without white space at its ends, except a line break directly after its text, and what follows
    that break.

    Rendered templates end so ("…<|im_start|>assistant\\n", "### Response:\\n"), and the answer begins on the next line.
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
        keep_line_end: strip the prompt as `strip_prompt` does.

    Raises:
        ValueError: saying which of its rules the row breaks.
    """
    prompt = strip_prompt(prompt) if keep_line_end else prompt.strip()
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


def make_rendered_example(prompt: str, target: str, choices: list[str] | None) -> Example:
    """An Example of a rendered prompt, with its choices if there are two or more, none empty, the target among them."""
    target = target.strip()
    can_rank = choices is not None and target in choices and len(set(choices)) > 1 and "" not in choices
    return make_example(prompt, [target], choices if can_rank else None)


def read_examples(
    rows: Iterable[_Row],
    read: Callable[[_Row, int], Iterable[Example]],
    where: str,
    dropped: Counter[str],
    suffix: str = "",
) -> Iterator[Example]:
    """The examples that `read(row, number)` makes of each row, numbered from 0.

    Rows for which it raises Dropped are counted in `dropped`, under the reason and `suffix`.

    Raises:
        TaskError: a row breaks a rule. The message begins with `where` and the row's number.
    """
    for number, row in enumerate(rows):
        try:
            yield from read(row, number)
        except Dropped as cause:
            dropped[cause.reason + suffix] += 1
        except ValueError as cause:
            raise TaskError(f"{where} {number}: {cause}.") from cause
