"""`bbh:NAME`: BIG-bench Hard as its authors published it.

For evaluation only: every row is in the test split. Files are NAME.json or NAME.json.gz holding {"canary",
"examples": [{"input", "target"}]}.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from phatgoose.errors import DownloadError, TaskError
from phatgoose.records import Example, Task
from phatgoose.registry import unknown
from phatgoose.tasks.examples import make_example, read_examples
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.sources.local_files import check_folder, given_folder, read_json
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions, build_task

HUB = "lukaemon/bbh"
_PUBLISHED = """
    boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting
"""
NAMES = tuple(_PUBLISHED.split())
_OPTIONS = re.compile(r"^Options:[ \t]*\n", re.MULTILINE)
_LETTER = re.compile(r"^(\([A-Z]\))[ \t]", re.MULTILINE)
_DASH = re.compile(r"^- *(\S.*?)[ \t]*$", re.MULTILINE)


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """One BBH task; `fractions` play no part."""
    files = _find_files(spec, folder)
    choices = tuple(spec.options["choices"].split("|")) if "choices" in spec.options else None
    where = f"{HUB}/{spec.name}" if files is None else str(files[spec.name])
    rows = _read_hub(spec.name) if files is None else _read_file(files[spec.name])

    def read(row: Any, _: int) -> list[Example]:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "target")):
            raise ValueError('expected {"input": text, "target": text}')
        return [to_example(row["input"], row["target"], choices)]

    examples = list(read_examples(rows, read, f"{where}, example", Counter()))
    origin = HUB if files is None else "folder"
    source = {"from": origin, "prompt_style": "input, then \\nAnswer:"}
    return build_task(f"bbh:{spec.name}", {"test": examples}, source, fractions)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    return "the Hub" if _find_files(spec, folder) is None else None


def list_names(folder: Path | None) -> list[str]:
    """The tasks in the folder, or those of the published set."""
    files = _list_files(folder)
    return sorted(NAMES if files is None else files)


def to_example(text: str, target: str, choices: tuple[str, ...] | None = None) -> Example:
    """The Example of a row. Raises ValueError if input or target is empty, or the target isn't a given choice."""
    if choices is None and (headings := list(_OPTIONS.finditer(text))):
        block = text[headings[-1].end() :]
        labels = tuple(_LETTER.findall(block)) or tuple(_DASH.findall(block))
        if target.strip() in labels and len(set(labels)) > 1:
            choices = labels
    return make_example(f"{text.strip()}\nAnswer:", [target], choices)


def _find_files(spec: TaskSpec, folder: Path | None) -> dict[str, Path] | None:
    """The files of the folder, the one that is asked for among them; None: the Hub's copy is read."""
    files = _list_files(folder)
    known = NAMES if files is None else tuple(files)
    if spec.name not in known:
        raise unknown("bbh task", spec.name, known)
    return files


def _list_files(folder: Path | None) -> dict[str, Path] | None:
    """Task → file; None if no folder is named."""
    folder = given_folder(folder, "PHATGOOSE_BBH")
    if folder is None:
        return None
    check_folder(folder, "NAME.json or NAME.json.gz files of BIG-bench Hard")
    found = sorted(p for p in folder.iterdir() if p.name.endswith((".json", ".json.gz")))
    return {p.name.partition(".json")[0]: p for p in found}


def _read_file(path: Path) -> list[Any]:
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("examples"), list):
        raise TaskError(f'{path}: expected an object with a list "examples".')
    return data["examples"]


def _read_hub(name: str) -> list[Any]:
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB, name, split="test"))
    except Exception as cause:
        raise DownloadError(
            f"can't load {HUB} ({name}) from the Hub: {cause}. Without a network, set PHATGOOSE_BBH to a folder with "
            "the published NAME.json files."
        ) from cause


SOURCE = TaskSource(load, check, ("choices",), list_names)
