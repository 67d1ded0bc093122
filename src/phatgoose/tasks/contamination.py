"""Contamination: which held-out rows share text with the rows that experts were trained on.

A text is words (lower case, letters and digits only). A held-out row is flagged if one of its runs of `n` words stands in a
training row, or, being shorter, if all of its words together are the whole of a training row. Runs that are part of the task's
own prompt, i.e. stand in more than a tenth of its rows, are passed over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from phatgoose.records import Example

WORDS = 13
"""The length of run that GPT-3's authors used."""
_COMMON = 0.1
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """How much of a held-out task was seen in training."""

    task: str
    rows: int
    flagged: tuple[int, ...]
    """Places of flagged rows among those looked at."""
    trained: tuple[str, ...]
    """Training tasks that they share text with."""


@dataclass
class _Measured:
    task: str
    rows: int
    own: str | None
    flagged: set[int] = field(default_factory=set)
    trained: dict[str, None] = field(default_factory=dict)


class Overlaps:
    """Rows that are measured, held against training rows one task after the other: only the former stay in memory.

    First `measured`, then `trained`, then `found`.
    """

    def __init__(self, n: int = WORDS):
        self.n = n
        self._tasks: list[_Measured] = []
        self._rows: dict[int, list[tuple[int, int]]] = {}  # run → (task, row) that hold it

    def measured(self, task: str, rows: Sequence[Example], *, own: str | None = None) -> None:
        """Takes in a measured task's rows.

        Args:
            own: a training task that doesn't count: the task's own, with which it shares passages and lists of choices.
        """
        found = [set(runs(text_of(example), self.n)) for example in rows]
        counts = Counter(run for row in found for run in row)
        common = max(2, round(_COMMON * len(rows)))
        for number, row in enumerate(found):
            for run in row:
                if counts[run] <= common:
                    self._rows.setdefault(run, []).append((len(self._tasks), number))
        self._tasks.append(_Measured(task, len(rows), own))

    def trained(self, name: str, examples: Iterable[Example]) -> None:
        """Holds a training task's rows, prompt and answers, against all that is measured."""
        for example in examples:
            for run in runs(text_of(example), self.n):
                for place, number in self._rows.get(run, ()):
                    one = self._tasks[place]
                    if one.own != name:
                        one.flagged.add(number)
                        one.trained[name] = None

    def found(self) -> list[Overlap]:
        """One for each measured task, in the order in which they came."""
        return [Overlap(t.task, t.rows, tuple(sorted(t.flagged)), tuple(t.trained)) for t in self._tasks]


def text_of(example: Example) -> str:
    """What a row is made of, for this purpose: its prompt and its first target."""
    return f"{example.input} {example.targets[0]}"


def runs(text: str, n: int) -> list[int]:
    """Hashes of every run of `n` words, or of all words if there are fewer."""
    words = _WORD.findall(text.casefold())
    if not words:
        return []
    return [hash(tuple(words[i : i + n])) for i in range(max(1, len(words) - n + 1))]
