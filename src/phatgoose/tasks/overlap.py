"""Contamination: which held-out rows share text with the rows that experts were trained on.

A text is words (lower case, letters and digits only). A held-out row is flagged if one of its runs of `n` words stands in a
training row, or, being shorter, if all of its words together are the whole of a training row. Runs that are part of the task's
own prompt, i.e. stand in more than a tenth of its rows, are passed over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phatgoose.records import Example, Task

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

    @property
    def share(self) -> float:
        return len(self.flagged) / max(1, self.rows)


class Seen:
    """What training tasks hold: hashes of their runs of words."""

    def __init__(self, n: int = WORDS):
        self.n = n
        self.tasks: list[str] = []
        self._runs: dict[int, int] = {}  # of the tasks that hold a run: bit n for task n

    def add(self, name: str, examples: Iterable[Example]) -> None:
        """Takes in a training task's rows: prompt and answers."""
        bit = 1 << len(self.tasks)
        self.tasks.append(name)
        for example in examples:
            for run in runs(text_of(example), self.n):
                self._runs[run] = self._runs.get(run, 0) | bit

    def overlap(self, task: Task, rows: Sequence[Example], *, own: str | None = None) -> Overlap:
        """Which of `rows` of a held-out task were seen, and in which training tasks.

        Args:
            own: a training task that doesn't count: the task's own, with which it shares passages and lists of choices.
        """
        found = [set(runs(text_of(example), self.n)) for example in rows]
        counts = Counter(run for row in found for run in row)
        common = max(2, round(_COMMON * len(rows)))
        counted = sum(1 << place for place, name in enumerate(self.tasks) if name != own)
        flagged, trained = [], 0
        for place, row in enumerate(found):
            seen = 0
            for run in row:
                if counts[run] <= common:
                    seen |= self._runs.get(run, 0) & counted
            if seen:
                flagged.append(place)
                trained |= seen
        names = tuple(name for place, name in enumerate(self.tasks) if trained >> place & 1)
        return Overlap(task.name, len(rows), tuple(flagged), names)


def text_of(example: Example) -> str:
    """What a row is made of, for this purpose: its prompt and its first target."""
    return f"{example.input} {example.targets[0]}"


def runs(text: str, n: int) -> list[int]:
    """Hashes of every run of `n` words, or of all words if there are fewer."""
    words = _WORD.findall(text.casefold())
    if not words:
        return []
    return [hash(tuple(words[i : i + n])) for i in range(max(1, len(words) - n + 1))]
