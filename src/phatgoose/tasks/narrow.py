"""Options of all sources' specs that leave out rows: `max_words` and `balance`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, Example, SplitName, Task
from phatgoose.tasks.spec import TaskSpec

OPTIONS = ("max_words", "balance")


def narrowed(task: Task, spec: TaskSpec, own: Collection[str] = ()) -> Task:
    """The task without the rows that the spec leaves out; its source counts them.

    `max_words=N` drops rows whose prompt has more than N words. `balance=true` then keeps of each split as many rows
    of each answer as the rarest answer of that split has: the first ones, in turn, so that the first rows of a split
    are balanced too. A row's answer is its first target.

    Args:
        own: options of the spec's source, which mean what the source makes of them.

    Raises:
        TaskError: an option says something else, or no row is left.
    """
    asked = spec.options.keys() & (set(OPTIONS) - set(own))
    if not asked:
        return task
    most = spec.count("max_words", 1) if "max_words" in asked else None
    if "balance" in asked and spec.options["balance"] != "true":
        raise TaskError(
            f"{spec.text}: balance must be true, or be left out, got {spec.options['balance']!r}."
        )
    dropped: Counter[str] = Counter()
    splits: dict[SplitName, tuple[Example, ...]] = {}
    for name in SPLITS:
        rows = task.split(name)
        short = tuple(e for e in rows if most is None or len(e.input.split()) <= most)
        even = _balanced(short) if "balance" in asked else short
        dropped["long"] += len(rows) - len(short)
        dropped["unbalanced"] += len(short) - len(even)
        splits[name] = even
    if not any(splits.values()):
        raise TaskError(f"{spec.text}: no prompt has at most {most} words.")
    return with_rows(task, splits, +dropped)


def with_rows(
    task: Task, splits: Mapping[SplitName, tuple[Example, ...]], dropped: Mapping[str, int]
) -> Task:
    """The task with these rows in place of its own, which its source says; `dropped` is added to its counts."""
    counts = {name: len(rows) for name, rows in splits.items()}
    said = {"rows": counts, "dropped": {**task.source.get("dropped", {}), **dropped}}
    return Task(task.name, splits["train"], splits["validation"], splits["test"], task.source | said)


def _balanced(rows: Sequence[Example]) -> tuple[Example, ...]:
    """Equally many rows of each answer: the first of each, then the second of each, and so on."""
    by_answer: dict[str, list[Example]] = {}
    for example in rows:
        by_answer.setdefault(example.targets[0], []).append(example)
    return tuple(example for turn in zip(*by_answer.values(), strict=False) for example in turn)
