"""Contamination: which held-out rows share text with the rows that experts were trained on.

A text is its words (lower case, letters and digits only). A held-out row is flagged if one of its runs of `n`
words is in a training row. A row with fewer words is flagged if all of its words together are a whole training
row. Runs that are in more than a tenth of a task's rows are part of the task's own prompt and don't count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from phatgoose.records import Example

RUN_WORDS = 13
"""Words in a run: what GPT-3's authors used."""
_COMMON = 0.1
_WORD = re.compile(r"\w+")


@dataclass
class Contamination:
    """How much of a held-out task was seen in training."""

    task: str
    rows: int
    own: str | None
    """The training task that doesn't count."""
    flagged_rows: set[int] = field(default_factory=set)
    shared_with: dict[str, None] = field(default_factory=dict)
    """Training tasks that share text with it, in the order in which they came."""


class ContaminationCheck:
    """Held-out rows, compared with one training task after the other, so that only the former stay in memory.

    First `add_held_out` for each task, then `compare` for each training task; `results` holds what was found,
    in the order of `add_held_out`.
    """

    def __init__(self, n: int = RUN_WORDS):
        self.n = n
        self.results: list[Contamination] = []
        self._rows: dict[int, list[tuple[int, int]]] = {}  # hash of a run → (task, row) pairs that hold it

    def add_held_out(self, task: str, rows: Sequence[Example], *, own: str | None = None) -> None:
        """Adds a held-out task's rows. `own`: a training task that doesn't count, as it shares passages and choices."""
        found = [set(hash_runs(text_of(example), self.n)) for example in rows]
        counts = Counter(run for row in found for run in row)
        common = max(2, round(_COMMON * len(rows)))
        for number, row in enumerate(found):
            for run in row:
                if counts[run] <= common:
                    self._rows.setdefault(run, []).append((len(self.results), number))
        self.results.append(Contamination(task, len(rows), own))

    def compare(self, name: str, examples: Iterable[Example]) -> None:
        """Compares the rows of a training task, prompts and answers, with all held-out rows."""
        for example in examples:
            for run in hash_runs(text_of(example), self.n):
                for task, number in self._rows.get(run, ()):
                    result = self.results[task]
                    if result.own != name:
                        result.flagged_rows.add(number)
                        result.shared_with[name] = None


def text_of(example: Example) -> str:
    """The text of a row that is compared: its prompt and its first target."""
    return f"{example.input} {example.targets[0]}"


def hash_runs(text: str, n: int) -> list[int]:
    """Hashes of every run of `n` words, or of all words if there are fewer."""
    words = _WORD.findall(text.casefold())
    if not words:
        return []
    return [hash(tuple(words[i : i + n])) for i in range(max(1, len(words) - n + 1))]
