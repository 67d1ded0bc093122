"""`flan:COLLECTION/TASK`: the FLAN collection (Open-Orca/FLAN), zero-shot prompts only."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import DownloadError, TaskError
from phatgoose.records import Example, Task
from phatgoose.tasks.examples import Dropped, make_example, read_examples
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.sources.local_files import find_file, read_lines
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions, build_task

HUB = "Open-Orca/FLAN"
FILES = {
    "flan2021": ("flan_zsopt_data", "flan_zsnoopt_data"),
    "dialog": ("dialog_zsopt_data",),
    "niv2": ("niv2_zsopt_data",),
}
"""Folders of the Hub's dataset that hold zero-shot prompts, by collection."""
NAMELESS = ("niv2",)
"""Collections whose tasks the Hub's rows don't name."""
ROWS = 500_000
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """One task, split by the split rule."""
    collection, task = _parts(spec, folder)
    most = spec.count("rows", ROWS)
    rows = _read_hub(collection, task) if folder is None else _read_folder(spec.name, folder)
    dropped: Counter[str] = Counter()
    examples = list(itertools.islice(read_examples(rows, _read, f"{spec.text}, row", dropped), most))
    origin = HUB if folder is None else "folder"
    source = {"from": origin, "prompt_style": "FLAN, as rendered, zero-shot"}
    return build_task(f"flan:{spec.name}", {"train": examples}, source, fractions, dropped)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    _parts(spec, folder)
    spec.count("rows", ROWS)
    if folder is None:
        return "the Hub"
    _find_file(spec.name, folder)
    return None


def _parts(spec: TaskSpec, folder: Path | None) -> tuple[str, str]:
    """(collection, task)"""
    collection, _, task = spec.name.partition("/")
    if collection not in FILES or not task:
        raise TaskError(f"{spec.text} should read flan:COLLECTION/TASK, COLLECTION being {', '.join(FILES)}.")
    if folder is None and collection in NAMELESS:
        raise TaskError(
            f"{spec.text} is a category of Natural Instructions: {HUB} holds its tasks one by one, without their "
            f"category. Gather them into {file_stem(spec.name)}.jsonl in a folder and give that."
        )
    return collection, task


def file_stem(name: str) -> str:
    """flan2021/ai2_arc/ARC-Easy:1.0.0 → flan2021_ai2_arc_ARC-Easy_1.0.0."""
    return re.sub(r"[^\w.-]", "_", name)


def _read(row: Mapping[str, Any], _: int) -> list[Example]:
    prompt, target = row.get("inputs"), row.get("targets")
    if not isinstance(prompt, str) or not isinstance(target, str):
        raise ValueError('expected texts in "inputs" and "targets"')
    if str(row.get("_template_type", "zs")).startswith("fs"):
        raise Dropped("few_shot")
    if not prompt.strip() or not target.strip():
        raise Dropped("empty")
    return [make_example(prompt, [target])]


def _find_file(name: str, folder: Path) -> Path:
    path = find_file(folder, file_stem(name), ENDINGS)
    if path is None:
        raise TaskError(f"{folder} has no {file_stem(name)}.jsonl, .jsonl.gz or .parquet for flan:{name}.")
    return path


def _read_folder(name: str, folder: Path) -> Iterable[Mapping[str, Any]]:
    path = _find_file(name, folder)
    if path.suffix == ".parquet":
        import datasets

        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    return (row for _, row in read_lines(path))


def _read_hub(collection: str, task: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        for part in FILES[collection]:
            rows = datasets.load_dataset(HUB, data_files=f"{part}/*", split="train", streaming=True)
            yield from (row for row in rows if row["_task_name"] == task)
    except Exception as cause:
        raise DownloadError(
            f"can't read {HUB} from the Hub: {cause}. Or give a folder with {file_stem(f'{collection}/{task}')}.jsonl."
        ) from cause


SOURCE = TaskSource(load, check, ("rows",))
