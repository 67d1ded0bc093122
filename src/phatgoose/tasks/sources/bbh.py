"""`bbh:NAME`: BIG-bench Hard as its authors published it. For evaluation only: every row is in the test split.

Files are NAME.json or NAME.json.gz holding {"canary", "examples": [{"input", "target"}]}, in `folder`, in
$PHATGOOSE_BBH, or else the Hub's copy (`lukaemon/bbh`). The prompt is the input, then "\\nAnswer:". Where the input
ends in an "Options:" block and the target is one of its labels ("(A)", or "Yes" of "- Yes"), the labels are choices;
`bbh:NAME?choices=True|False` gives them where the input doesn't.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from phatgoose.errors import DownloadError, TaskError
from phatgoose.files import is_folder
from phatgoose.records import Example, Task
from phatgoose.registry import unknown
from phatgoose.tasks.columns import make_example
from phatgoose.tasks.sources import TaskSource
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
    """One BBH task; `fractions` play no part.

    Raises:
        UnknownName: there is no such task.
        TaskError: the file is malformed.
        DownloadError: the Hub can't be reached.
    """
    files = _find(spec, folder)
    fixed = tuple(spec.options["choices"].split("|")) if "choices" in spec.options else None
    where = f"{HUB}/{spec.name}" if files is None else str(files[spec.name])
    rows = _hub(spec.name) if files is None else _read(files[spec.name])
    examples = []
    for i, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("input"), str)
            or not isinstance(row.get("target"), str)
        ):
            raise TaskError(f'{where}, example {i}: expected {{"input": text, "target": text}}.')
        try:
            examples.append(to_example(row["input"], row["target"], fixed))
        except ValueError as cause:
            raise TaskError(f"{where}, example {i}: {cause}.") from cause
    source = {"spec": spec.text, "source": "bbh", "from": HUB if files is None else "folder"}
    source["prompt_style"] = "input, then \\nAnswer:"
    return build_task(f"bbh:{spec.name}", {"test": examples}, source, fractions)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    """As `TaskSource.check`."""
    return "the Hub" if _find(spec, folder) is None else None


def _find(spec: TaskSpec, folder: Path | None) -> dict[str, Path] | None:
    """The files of the folder, the one that is asked for among them; None: the Hub's copy is read."""
    files = _files(folder)
    known = NAMES if files is None else tuple(files)
    if spec.name not in known:
        raise unknown("bbh task", spec.name, known)
    return files


def list_names(folder: Path | None) -> list[str]:
    """The tasks in the folder, or those of the published set."""
    files = _files(folder)
    return sorted(NAMES if files is None else files)


def to_example(text: str, target: str, choices: tuple[str, ...] | None = None) -> Example:
    """The Example of one row. Raises ValueError if input or target is empty, or the target none of the given choices."""
    if choices is None and (parts := list(_OPTIONS.finditer(text))):
        block = text[parts[-1].end() :]
        found = tuple(_LETTER.findall(block)) or tuple(_DASH.findall(block))
        if target.strip() in found and len(set(found)) > 1:
            choices = found
    return make_example(f"{text.strip()}\nAnswer:", [target], choices)


def _files(folder: Path | None) -> dict[str, Path] | None:
    if folder is None and (named := os.environ.get("PHATGOOSE_BBH")):
        folder = Path(named).expanduser()
    if folder is None:
        return None
    if not is_folder(folder, TaskError):
        raise TaskError(
            f"{folder} is not a folder; expected one with NAME.json or NAME.json.gz files of BIG-bench Hard."
        )
    found = sorted(p for p in folder.iterdir() if p.name.endswith((".json", ".json.gz")))
    return {p.name.partition(".json")[0]: p for p in found}


def _read(path: Path) -> list[Any]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        data = json.loads(raw)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as cause:
        raise TaskError(f"{path} can't be read: {cause}.") from cause
    if not isinstance(data, dict) or not isinstance(data.get("examples"), list):
        raise TaskError(f'{path}: expected an object with a list "examples".')
    return data["examples"]


def _hub(name: str) -> list[Any]:
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB, name, split="test"))
    except Exception as cause:
        raise DownloadError(
            f"can't load {HUB} ({name}) from the Hub: {cause}. Without a network, set PHATGOOSE_BBH to a folder with "
            "the published NAME.json files."
        ) from cause


SOURCE = TaskSource(load, check, ("choices",), list_names)
