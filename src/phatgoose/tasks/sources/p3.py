"""`p3:CONFIG`: a config of `bigscience/P3`, T0's data with its prompts rendered.

Columns: inputs_pretokenized, targets_pretokenized, and answer_choices where a prompt has choices. In `*_score_eval`
configs a row is one choice: rows with one idx (its first number) and input are one example, is_correct marks the right
ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, Example, SplitName, Task
from phatgoose.registry import unknown
from phatgoose.tasks.examples import Dropped, make_example, make_rendered_example
from phatgoose.tasks.sources import TaskSource, hf
from phatgoose.tasks.sources.local_files import check_folder, find_file
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions, build_task

HUB = "bigscience/P3"
ENDINGS = ("", ".parquet", ".jsonl", ".jsonl.gz", ".json")


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """One prompt of one dataset."""
    copy: dict[str, Any] = {}
    if folder is None:
        options = spec.options | {"config": spec.name}
        data = hf.load_data(TaskSpec("p3", HUB, options, spec.text), source=copy)
    else:
        data = hf.load_data(TaskSpec("p3", str(_find_file(spec.name, folder).resolve()), {}, spec.text))
    columns = {name for part in data.values() for name in part.features}
    if missing := {"inputs_pretokenized", "targets_pretokenized"} - columns:
        raise TaskError(
            f"p3:{spec.name} has no column {', '.join(sorted(missing))} (columns: {', '.join(sorted(columns))})."
        )
    own, dropped = _grouped(data, spec) if "is_correct" in columns else hf.read_splits(data, spec, _read)
    origin = HUB if folder is None else "folder"
    source = {"from": origin, "prompt_style": "P3, as rendered", **copy}
    return build_task(f"p3:{spec.name}", own, source, fractions, dropped)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    if folder is None:
        return "the Hub"
    _find_file(spec.name, folder)
    return None


def _find_file(name: str, folder: Path) -> Path:
    check_folder(folder, "a file or folder for each P3 config")
    path = find_file(folder, name, ENDINGS)
    if path is None:
        known = {p.name.partition(".")[0] for p in folder.iterdir() if not p.name.startswith(".")}
        raise unknown("P3 config", name, known)
    return path


def _read(row: Mapping[str, Any], _: Mapping[str, list[str]], __: str) -> list[Example]:
    """A row is an example. It has choices if there are at least two and the target is one of them."""
    target = row["targets_pretokenized"] or ""
    if not target.strip():
        raise Dropped("unlabelled", "no target")
    choices = [c.strip() for c in row.get("answer_choices") or ()]
    return [make_rendered_example(row["inputs_pretokenized"] or "", target, choices)]


def _grouped(data: Mapping[str, Any], spec: TaskSpec) -> tuple[dict[SplitName, list[Example]], Counter[str]]:
    """Score-eval rows, one for each choice, gathered into examples; a group without a right choice is dropped."""
    own: dict[SplitName, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for split, part in hf.choose_splits(data, spec).items():
        groups: dict[tuple[int, str], dict[str, bool]] = {}
        for i, row in enumerate(part):
            number = row["idx"][0] if isinstance(row.get("idx"), list) and row["idx"] else row.get("idx")
            if not isinstance(number, int):
                raise TaskError(
                    f"{spec.text}, {split} row {i}: idx must be a number or a list of numbers, got {number!r}."
                )
            group = groups.setdefault((number, row["inputs_pretokenized"] or ""), {})
            choice = (row["targets_pretokenized"] or "").strip()
            group[choice] = group.get(choice, False) or bool(row["is_correct"])
        own[split] = []
        for (number, prompt), choices in groups.items():
            if len(set(choices.values())) == 1:
                dropped["no_right_choice" if not any(choices.values()) else "all_choices_right"] += 1
                continue
            try:
                own[split].append(make_example(prompt, [c for c, right in choices.items() if right], choices))
            except ValueError as cause:
                raise TaskError(f"{spec.text}, {split} idx {number}: {cause}.") from cause
    return own, dropped


SOURCE = TaskSource(load, check, (*SPLITS, "revision"))
