"""`jsonl:PATH`: one JSON object per line; `rows_source`: such a source for other files of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from phatgoose.errors import TaskError, UnknownName
from phatgoose.files import sha256_file
from phatgoose.records import SPLITS, Example, SplitName, Task
from phatgoose.tasks import messages
from phatgoose.tasks.columns import OPTIONS, OTHER_ANSWER, Columns, to_example
from phatgoose.tasks.examples import Dropped
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.sources.local_files import read_lines
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import CHAT, Fractions, build_task

FIELDS = ("input", "target", "targets", "choices", "answer_index", "split")
ReadRows = Callable[[Path], Iterable[tuple[int, dict[str, Any]]]]
"""A file → (line number, row) for each of its rows. Raises TaskError if the file can't be read."""


def rows_source(read_rows: ReadRows) -> TaskSource:
    """The source `name:PATH` of the files that `read_rows` reads.

    A relative path starts at the folder that `load_task` was given, if any. `load` raises a TaskError if the file is
    missing, empty or malformed; the message names the line.
    """

    def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
        path = spec.local_path(folder)
        return _load_rows(spec, path, read_rows(path), fractions)

    return TaskSource(load, _check, (*OPTIONS, *messages.OPTIONS, "ignore", "split"), local=True)


def _load_rows(
    spec: TaskSpec, path: Path, rows: Iterable[tuple[int, dict[str, Any]]], fractions: Fractions
) -> Task:
    own: dict[SplitName, list[Example]] = {name: [] for name in SPLITS}
    with_split = chats = count = 0
    dropped: Counter[str] = Counter()
    for number, row in rows:
        where = f"{path}, line {number}"
        try:
            split, examples = _row(spec, row, where)
        except Dropped as cause:
            dropped[cause.reason] += 1
            continue
        count += 1
        with_split += split is not None
        chats += examples[0].conversation is not None
        if with_split not in (0, count):
            raise TaskError(f'{where}: either every row has a "split" or none has.')
        if chats not in (0, count):
            raise TaskError(f"{where}: either every row holds messages or none does.")
        own[split or "train"] += examples
    if not any(own.values()):
        raise TaskError(f"{path} has no examples.")
    style = CHAT if chats else "as is"
    source = {"file": path.name, "sha256": sha256_file(path), "prompt_style": style}
    return build_task(f"{spec.source}:{path.name.partition('.')[0]}", own, source, fractions, dropped)


def _check(spec: TaskSpec, folder: Path | None) -> str | None:
    path = spec.local_path(folder)
    if not path.is_file():
        raise TaskError(f"{path} does not exist.")
    return None


def _row(spec: TaskSpec, row: dict[str, Any], where: str) -> tuple[SplitName | None, list[Example]]:
    options = spec.options
    chat = messages.message_columns(row, options)
    columns = Columns() if chat else _columns(spec, row, where)
    split_column = options.get("split", "split")
    read = messages.columns_read(chat, options) if chat else columns.columns_read()
    try:
        examples = messages.to_examples(row, chat, options, where) if chat else [to_example(row, columns)]
    except UnknownName as cause:
        raise TaskError(f"{where}: {cause}.") from cause
    except ValueError as cause:
        if isinstance(cause, Dropped) and cause.reason == OTHER_ANSWER:  # which others=drop asks for
            raise
        # A misspelt field may explain the problem, so it is reported first.
        _refuse_unread(spec, row, read | {split_column}, where)
        raise TaskError(f"{where}: {cause}.") from cause
    _refuse_unread(spec, row, read | {split_column}, where)
    split = row.get(split_column)
    if split not in (None, *SPLITS):
        raise TaskError(f'{where}: "{split_column}" must be train, validation or test, got {split!r}.')
    return split, examples


def _refuse_unread(spec: TaskSpec, row: dict[str, Any], read: set[str], where: str) -> None:
    ignored = spec.options.get("ignore", "")
    if ignored == "*":
        return
    read = read | {name.strip() for name in ignored.split(",")}
    for name in row:
        if name not in read and not name.startswith("_"):
            raise TaskError(
                f'{where}: field "{name}" is not read by anything (fields: {", ".join(FIELDS)}). Map it with '
                f"options such as ?input={name}, or pass over it with ?ignore={name}."
            )


def _columns(spec: TaskSpec, row: dict[str, Any], where: str) -> Columns:
    """The columns that the options name; the documented fields of the row where they name none."""
    explicit = spec.options.keys() & {"target", "answer_index", "choices"}
    if not explicit & {"target", "answer_index"} and "target" in row and "targets" in row:
        raise TaskError(f'{where}: has both "target" and "targets".')
    has = [name for name in ("target", "targets") if name in row]
    default = Columns(
        target=has[0] if has else None,
        choices="choices" if "choices" in row else None,
        answer_index="answer_index" if "answer_index" in row and "target" not in explicit else None,
    )
    return Columns.from_spec(spec, default)


SOURCE = rows_source(read_lines)
