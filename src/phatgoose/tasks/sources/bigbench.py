"""`bigbench:NAME[/SUBTASK]`: BIG-bench's JSON tasks, as BIG-bench means their fields.

The rules of prompts and choices are in docs/tasks.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.records import Example, Task
from phatgoose.tasks.examples import Dropped, make_example, read_examples
from phatgoose.tasks.sources import TaskSource, bigbench_files
from phatgoose.tasks.sources.local_files import unpacked_folder
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions, build_task

GENERIC_LABELS = frozenset({
    "", "q", "question", "input", "text", "sentence", "example", "a", "answer", "output", "the answer is",
    "best choice",
})  # fmt: skip
"""Prefixes (without colon, case folded) that say nothing about the task; the empty one too."""

RANKED, MATCHED = "multiple_choice_grade", "exact_str_match"


@dataclass(frozen=True)
class PromptStyle:
    """How the prompts of all rows of one task.json are made."""

    opening: str
    """Instruction and input prefix, before the input."""
    closing: str
    """Output prefix, after input and choices; empty if generic."""
    choice_prefix: str
    """Text before each choice."""
    show_choices: bool
    """True if choices are part of the prompt."""
    prefer_rank: bool
    """True if a row with both target and target_scores is ranked."""


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """One task, or all subtasks of one together.

    Raises:
        UnknownName: no such task or subtask.
        TaskError: a file is malformed (named, with the row), has no examples, the task is programmatic, or its
            rows have no choices and ranked=true.
        DownloadError, StorageError: BIG-bench can't be fetched or unpacked.
    """
    ranked = _ranked(spec)
    root = bigbench_files.root(folder)
    name = spec.name.strip("/")
    parts = bigbench_files.find(root, name)
    dropped: Counter[str] = Counter()
    examples = [e for _, path, data in parts for e in _examples(path, data, dropped, ranked)]
    preferred = {part: data.get("preferred_score") for part, _, data in parts}
    scores = sorted({str(s) for s in preferred.values()})
    source: dict[str, Any] = {}
    package = bigbench_files.PACKAGE
    if root == unpacked_folder(package):
        source |= {"package": package.requirement, "sha256": package.sha256}
    source |= {
        "subtasks": [part for part, _, _ in parts] if len(parts) > 1 else [],
        "prompt_style": "bigbench/1: task_prefix, input prefix, input, choices, output prefix, then \\nAnswer:",
        "preferred_score": scores[0] if len(scores) == 1 else preferred,
        "scored_as": sorted(
            {"exact match" if e.choices is None else "rank classification" for e in examples}
        ),
        "other_metric": any(s not in (RANKED, MATCHED, "None") for s in scores),
    }
    return build_task(f"bigbench:{name}", {"train": examples}, source, fractions, dropped)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    _ranked(spec)
    if not bigbench_files.is_available(folder):
        return "BIG-bench, which isn't in the cache"
    bigbench_files.find(bigbench_files.root(folder), spec.name.strip("/"))
    return None


def is_generic(prefix: str) -> bool:
    """True if a prefix is a mere label."""
    return prefix.strip().rstrip(":").rstrip().casefold() in GENERIC_LABELS


def prompt_style(path: Path, data: dict[str, Any]) -> PromptStyle:
    """The PromptStyle of one task.json. Raises TaskError if a field has another type than BIG-bench gives it."""

    def text(key: str, default: str) -> str:
        value = data.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise TaskError(f'{path}: "{key}" must be text, got {type(value).__name__}.')
        return value

    show = data.get("append_choices_to_input", True)
    show = {"true": True, "false": False}.get(show.casefold(), show) if isinstance(show, str) else show
    if not isinstance(show, bool):
        raise TaskError(f'{path}: "append_choices_to_input" must be true or false, got {show!r}.')
    metrics = data.get("metrics") or []
    preferred = data.get("preferred_score") or (RANKED if RANKED in metrics else MATCHED)
    names = ("task_prefix", "example_input_prefix", "example_output_prefix")
    prefix, before, after = (text(name, "") for name in names)
    if is_generic(before):
        # The label also separated the instruction from the input; a line break takes its place.
        before = "" if not prefix or prefix[-1].isspace() else "\n"
    return PromptStyle(
        opening=prefix + before,
        closing="" if is_generic(after) else after,
        choice_prefix=text("choice_prefix", "\n  choice: "),
        show_choices=show,
        prefer_rank=preferred == RANKED,
    )


def _ranked(spec: TaskSpec) -> bool:
    value = spec.options.get("ranked", "false")
    if value not in ("true", "false"):
        raise TaskError(f"{spec.text}: ranked is true or false, got {value!r}.")
    return value == "true"


def _examples(path: Path, data: dict[str, Any], dropped: Counter[str], ranked: bool) -> Iterator[Example]:
    rows = data.get("examples")
    if not isinstance(rows, list) or not rows:
        raise TaskError(f'{path}: "examples" must be a list of at least one row.')
    style = prompt_style(path, data)
    style = replace(style, prefer_rank=style.prefer_rank or ranked)

    def read(row: Any, _: int) -> list[Example]:
        example = to_example(row, style)
        if ranked and example.choices is None:
            raise ValueError('no "target_scores", and the spec says ranked=true')
        return [example]

    return read_examples(rows, read, f"{path}, example", dropped)


def to_example(row: Any, style: PromptStyle) -> Example:
    """The Example of a row.

    Raises:
        Dropped: "no_right_choice", "one_choice" or "empty_answer".
        ValueError: the row is malformed.
    """
    if not isinstance(row, dict) or not isinstance(row.get("input"), str):
        raise ValueError('expected an object with a text "input"')
    if row.get("target") is None and row.get("target_scores") is None:
        raise ValueError('neither "target" nor "target_scores"')
    ranked = row.get("target_scores") is not None and (style.prefer_rank or row.get("target") is None)
    scores = _scores(row["target_scores"]) if row.get("target_scores") is not None else {}
    choices = shuffled(row["input"], scores)
    prompt = style.opening + row["input"]
    if style.show_choices:
        prompt += "".join(style.choice_prefix + choice for choice in choices)
    prompt = (prompt + style.closing).strip() + "\nAnswer:"
    if not ranked:
        if not (targets := _targets(row["target"])):
            raise Dropped("empty_answer")
        return make_example(prompt, targets)
    if "" in scores:
        raise Dropped("empty_answer")
    if len(scores) < 2:
        raise Dropped("one_choice")
    best = max(scores.values())
    if best == min(scores.values()):
        raise Dropped("no_right_choice")
    return make_example(prompt, [c for c in choices if scores[c] == best], choices)


def shuffled(text: str, choices: dict[str, float]) -> list[str]:
    """The choices in the order of sha256(input, choice): a shuffle seeded by the row, the same on every machine."""
    return sorted(choices, key=lambda choice: hashlib.sha256(f"{text}\0{choice}".encode()).digest())


def _scores(raw: Any) -> dict[str, float]:
    """Stripped choice → score; choices that differ in white space only are one, with the higher score."""
    if not isinstance(raw, dict) or not raw:
        raise ValueError('"target_scores" must be an object of choice: score')
    scores: dict[str, float] = {}
    for choice, score in raw.items():
        if not isinstance(score, int | float) or score != score:
            raise ValueError(f'"target_scores" gives {choice!r} the score {score!r}, expected a number')
        scores[choice.strip()] = max(score, scores.get(choice.strip(), score))
    return scores


def _targets(raw: Any) -> list[str]:
    """Acceptable answers as text. Empty ones are left out, since they can't be generated."""
    values = raw if isinstance(raw, list) else [raw]
    for value in values:
        if not isinstance(value, str | int | float):
            raise ValueError(f'"target" holds {type(value).__name__}, expected text or a number')
    return [text for value in values if (text := str(value).strip())]


SOURCE = TaskSource(
    load, check, ("ranked",), lambda folder: bigbench_files.names(bigbench_files.root(folder))
)
