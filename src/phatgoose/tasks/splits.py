"""The split rule: which rows are for training, validation and test.

h(prompt) = sha256 of the prompt (runs of white space made one space, case folded), its first 16 hex digits as
a fraction of 2^64. h < 0.2 is test, h < 0.3 validation, the rest train; inside a split rows are sorted by h.
So a row's split depends on nothing but its prompt: rows with the same prompt share a split, also in two tasks,
and adding or removing a row moves no other. The first n rows of a split are a random sample. Turns of a
conversation are split by what comes before its first answer (`Example.placed_by`), so they share a split.
Everyone's results rely on the rule: whoever changes it changes RULE.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, Example, SplitName, Task

RULE = 1
"""Version of the rule, recorded in every task's source."""
CHAT = "through the base's chat template"
"""The prompt_style of a task of conversations, recorded in its source."""

Splits = dict[SplitName, tuple[Example, ...]]


@dataclass(frozen=True)
class Fractions:
    """How much of a task is kept from training."""

    test: float = 0.2
    """Fraction of prompts in the test split."""
    validation: float = 0.1
    """Fraction of prompts in the validation split."""

    def __post_init__(self) -> None:
        if not (0 <= self.test <= 1 and 0 <= self.validation <= 1 and self.test + self.validation <= 1):
            raise TaskError(
                "split fractions must lie in [0, 1] and sum to at most 1, "
                f"got test={self.test}, validation={self.validation}."
            )

    def split_of(self, h: float) -> SplitName:
        """The split of a prompt with this hash."""
        if h < self.test:
            return "test"
        return "validation" if h < self.test + self.validation else "train"


def normalise(prompt: str) -> str:
    """What two prompts must share to count as the same one."""
    return " ".join(prompt.split()).casefold()


def hash_fraction(prompt: str) -> float:
    """h(prompt) in [0, 1)."""
    return int(hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16], 16) / 2**64


def merge(examples: Iterable[Example]) -> tuple[list[Example], Counter[str]]:
    """One example for each prompt and set of choices, in order of first appearance, and how many rows were
    merged or dropped.

    Rows that are equal in everything are kept once ("duplicate"). Rows with the same prompt and the same
    choices, if any, but other targets become one example that accepts the targets of all ("merged"; the first
    row's order stays). A prompt with two sets of choices is two questions: both stay, in one split. An example
    of which every choice is right can't be scored and is dropped ("all_choices_right").
    """
    first: dict[tuple[str, str | None, frozenset[str] | None], Example] = {}
    counts: Counter[str] = Counter()
    for e in examples:
        key = (e.input, e.conversation, None if e.choices is None else frozenset(e.choices))
        known = first.setdefault(key, e)
        if known is e:
            continue
        new = [i for i, t in enumerate(e.targets) if t not in known.targets]
        counts["merged" if new else "duplicate"] += 1
        if new:
            targets = known.targets + tuple(e.targets[i] for i in new)
            answers = known.answers + tuple(e.answers[i] for i in new if e.answers)
            first[key] = replace(known, targets=targets, answers=answers)
    kept = [e for e in first.values() if e.choices is None or set(e.targets) != set(e.choices)]
    counts["all_choices_right"] = len(first) - len(kept)
    return kept, +counts


def split(own: Mapping[SplitName, Sequence[Example]], fractions: Fractions) -> tuple[Splits, Counter[str]]:
    """Three disjoint splits from the splits that a source has (all rows under "train" if it has none), and counts.

    A source's own validation and test splits are kept; one that is missing or empty is taken out of train by
    the split rule. A prompt that is also in test is dropped from validation and train, one in validation from
    train (counted as "train_in_test" and so on). Rows are merged inside a split and sorted by h.
    """
    counts: Counter[str] = Counter()
    merged: dict[SplitName, list[Example]] = {}
    for name in SPLITS:
        merged[name], found = merge(own.get(name, ()))
        counts += found
    wanted = {name for name in SPLITS if name == "train" or not merged[name]}
    carved: dict[SplitName, list[Example]] = {name: [] for name in SPLITS}
    for e in merged["train"]:
        split_name = fractions.split_of(hash_fraction(e.placed_by))
        carved[split_name if split_name in wanted else "train"].append(e)
    rows = {name: carved[name] if name in wanted else merged[name] for name in SPLITS}
    seen: dict[str, SplitName] = {}
    result: dict[SplitName, list[Example]] = {}
    for name in reversed(SPLITS):
        result[name] = []
        for e in rows[name]:
            if (elsewhere := seen.get(normalise(e.placed_by), name)) != name:
                counts[f"{name}_in_{elsewhere}"] += 1
            else:
                result[name].append(e)
        seen.update((normalise(e.placed_by), name) for e in result[name])
    return {name: tuple(sorted(result[name], key=_order)) for name in SPLITS}, counts


def _order(e: Example) -> tuple[float, str, str, tuple[str, ...]]:
    return hash_fraction(e.placed_by), e.input, e.conversation or "", e.choices or ()


def build_task(
    name: str,
    own: Mapping[SplitName, Sequence[Example]],
    source: dict[str, Any],
    fractions: Fractions,
    dropped: Mapping[str, int] | None = None,
) -> Task:
    """The Task of a source's rows, with the split rule and all counts in `source`. Raises TaskError if none is left."""
    splits, counts = split(own, fractions)
    dropped = {k: v for k, v in sorted((dropped or {}).items()) if v}
    if not any(splits.values()):
        raise TaskError(f"task {name} has no examples{f' (rows dropped: {dropped})' if dropped else ''}.")
    how = {
        "split_rule": {"version": RULE, "test": fractions.test, "validation": fractions.validation},
        "own_splits": [s for s in SPLITS if own.get(s) and s != "train"],
        "rows": {s: len(splits[s]) for s in SPLITS},
        "dropped": dropped,
        "merging": dict(sorted(counts.items())),
    }
    return Task(name, **splits, source=source | how)
