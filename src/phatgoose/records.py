"""Frozen records that travel between the rooms. Data only: no tensors, no I/O."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One row of a task.

    `input` is the whole prompt as the model sees it (instruction included). It ends in white space only if a
    line break is part of that: then the answer follows directly.
    `targets` are all acceptable answers, best first; the first is the one trained on.
    `choices`, if given, are the answer choices in order; every target is one of them and the row is scored
    by rank classification. Without choices the row is scored by exact match of a greedy generation.
    Neither choices nor targets start with a space: the space between prompt and answer, if any, is added on encoding.
    `group` names the raw row that a prompt shows, if the source shows it under several prompts: examples
    of one group aren't independent. Equality and a task's hash ignore it.

    A row that is a conversation (`tasks/messages.py`) has a `conversation`, and in `answers` the assistant's
    message for each target; a chat template makes the prompt and the answers of them. `input` and `targets`
    are then their texts, for people and comparisons.
    """

    input: str
    targets: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    group: str | None = field(default=None, compare=False, repr=False)
    conversation: str | None = field(default=None, repr=False)
    """JSON of {"messages": […], "tools": […]}: what stands before the answer; None for a plain prompt."""
    answers: tuple[str, ...] = field(default=(), repr=False)
    """JSON of a message for each target; empty for a plain prompt."""
    opening: str | None = field(default=None, compare=False, repr=False)
    """The text that decides the split, if that isn't `input`: for a later turn, what comes before the
    conversation's first answer."""

    @property
    def placed_by(self) -> str:
        """The text that decides the split."""
        return self.input if self.opening is None else self.opening

    def messages(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """(messages, tools) of a conversation."""
        found = json.loads(self.conversation or "{}")
        return found["messages"], found.get("tools")


def groups_of(examples: Sequence[Example]) -> tuple[int, ...]:
    """For each example the number of its group, in order of first appearance; one without a group is one by itself."""
    numbers: dict[Any, int] = {}
    return tuple(
        numbers.setdefault(place if e.group is None else e.group, len(numbers))
        for place, e in enumerate(examples)
    )


@dataclass(frozen=True)
class Task:
    """A named set of examples in three disjoint splits.

    `source` says how to load the same task again (spec, version, options) and is written into expert.json.
    """

    name: str
    train: tuple[Example, ...] = field(repr=False)
    validation: tuple[Example, ...] = field(repr=False)
    test: tuple[Example, ...] = field(repr=False)
    source: dict[str, Any] = field(default_factory=dict, compare=False)

    def split(self, name: SplitName) -> tuple[Example, ...]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def cut(self, limits: Mapping[SplitName, int]) -> Task:
        """The task with at most so many rows in each split that is named: the first ones, which are a random sample."""
        rows = {name: self.split(name)[:most] for name, most in limits.items()}
        return replace(self, **rows)  # type: ignore[arg-type]  # the names of splits are fields

    @property
    def hash(self) -> str:
        """sha256 over every example of every split, in order: two tasks with one hash hold the same rows."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(split.encode())
            for e in self.split(split):
                row: list[Any] = [e.input, e.targets, e.choices]
                row += [] if e.conversation is None else [e.conversation, e.answers]
                digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What a base model is, independent of the dtype it was loaded in. See `phatgoose.models.base.fingerprint`.

    `spec` is only a label for people. `architecture` must be equal for two bases to be the same;
    `samples` are groups of weights sampled at fixed places, compared within the error of a cast.
    """

    spec: str
    architecture: dict[str, Any]
    samples: dict[str, tuple[float, ...]] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "architecture": self.architecture,
            "samples": {k: list(v) for k, v in self.samples.items()},
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Fingerprint:
        """Raises ValueError or KeyError if `data` is no such record."""
        spec, architecture, samples = data["spec"], data["architecture"], data["samples"]
        if not isinstance(spec, str) or not isinstance(architecture, dict) or not isinstance(samples, dict):
            raise ValueError("expected a spec, an architecture and samples")
        for group, values in samples.items():
            for x in values if isinstance(values, list | tuple) else [None]:
                if (
                    isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) <= 3.5e38
                ):  # NaN as well
                    raise ValueError(f"samples of {group[:100]!r} are not finite numbers")
        return Fingerprint(spec, architecture, {k: tuple(map(float, v)) for k, v in samples.items()})


@dataclass(frozen=True)
class HubSource:
    """Where on the Hub an expert was fetched from: a repository, one of its commits, and a folder in it.

    As text "org/name@commit" or "org/name@commit:folder", which can be fetched again.
    """

    repo: str
    revision: str
    """The commit's sha, 40 hex digits."""
    subfolder: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" + (f":{self.subfolder}" if self.subfolder else "")

    def to_json(self) -> dict[str, str]:
        return {"repo": self.repo, "revision": self.revision, "subfolder": self.subfolder}

    @staticmethod
    def from_json(data: dict[str, Any]) -> HubSource:
        """Raises ValueError or KeyError if `data` is no such record."""
        source = HubSource(*(str(data[key]) for key in ("repo", "revision", "subfolder")))
        valid = re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo, re.ASCII) and source.subfolder.isprintable()
        if not valid or not re.fullmatch("[0-9a-f]{40}", source.revision):
            raise ValueError('expected a repo "org/name", a revision of 40 hex digits and a subfolder')
        return source


@dataclass(frozen=True)
class Prediction:
    """What the model answered on one example, kept so that scores can be recomputed and compared row by row.

    `text` is the chosen answer or the generated text; for a generation stopped at its first deviation from
    every target, the text up to that token, and `complete` is False. `choice_scores` are the length-normalised
    log-likelihoods (nats per token) in the order of the example's choices.
    """

    correct: bool
    text: str
    complete: bool = True
    choice_scores: tuple[float, ...] | None = None
    value: float | None = None
    """A graded score in [0, 1] where the task's metric has one (ROUGE); then `correct` means value = 1."""

    @property
    def points(self) -> float:
        """The row's score in a task's mean."""
        return float(self.correct) if self.value is None else self.value


@dataclass(frozen=True)
class TaskScore:
    """Accuracy, or the mean of a graded metric, on one task's split, with its bootstrap 95 % interval and
    every prediction."""

    task: str
    split: SplitName
    metric: str
    mean: float
    low: float
    high: float
    rows: int
    task_hash: str = ""
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)
    truncated_rows: int = 0
    """Rows whose prompt was cut from the left to fit the model's context (or a given limit)."""
    groups: tuple[int, ...] = field(default=(), repr=False)
    """For each prediction the number of its raw row (`Example.group`); empty if each prediction has a row of
    its own."""

    @property
    def raw_rows(self) -> int:
        """The number of different raw rows, which are independent."""
        return len(set(self.groups)) or self.rows


@dataclass(frozen=True)
class Scores:
    """The result of `evaluate`: one TaskScore per task, and their unweighted mean with its interval."""

    tasks: tuple[TaskScore, ...]
    mean: float
    low: float
    high: float

    def __getitem__(self, task: str) -> TaskScore:
        for score in self.tasks:
            if score.task == task:
                return score
        raise KeyError(task)
