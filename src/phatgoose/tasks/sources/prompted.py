"""`prompted:DATASET[/SUBSET]`: raw rows of a dataset under promptsource's prompts, as T0 and PHATGOOSE were trained and measured.

    prompted:super_glue/rte?templates=original&test=validation
    prompted:wiki_qa?without=Jeopardy style|Generate Question from Topic&rows=2000

The prompts (Jinja, Apache-2.0) are read from the pinned sdist of `promptsource`, never imported. `templates=` is `all` (the
default), `original` (those of the dataset's original task) or names separated by |; `without=` leaves some out. Rows come from the
Hub (`hub=` and `subset=` give another id, `revision=` pins it), or with a folder from DATASET_SUBSET.SPLIT.jsonl[.gz] there
(`files=` gives another stem); such a file may also hold rendered rows: {"template", "prompt", "completion"}. Each row is shown
under every template; of more than `rows=` (500,000, as in T0) a fixed random part is taken. Splits: `train=`, `validation=`,
`test=` name them; one that is missing is taken from train by the raw row, so that all prompts of a row share a split.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phatgoose.errors import TaskError
from phatgoose.files import is_folder, sha256_json
from phatgoose.records import SPLITS, Example, SplitName, Task
from phatgoose.registry import unknown
from phatgoose.tasks.columns import make_example
from phatgoose.tasks.sources import TaskSource, hf
from phatgoose.tasks.sources.jsonl import read_lines
from phatgoose.tasks.sources.known_datasets import check_splits, to_hub_row
from phatgoose.tasks.sources.promptsource import PACKAGE, Template, config_name, is_available, templates
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions, build_task, position

ROWS = 500_000
ENDINGS = (".jsonl", ".jsonl.gz")
_SPLIT_FILES = {"validation": ("validation", "dev", "val"), "train": ("train",), "test": ("test",)}

Rows = Sequence[Mapping[str, Any]]


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """One dataset under its prompts.

    Raises:
        UnknownName: promptsource has no such dataset or template.
        TaskError: no file in the folder, or a row that no template can render.
        DownloadError: the Hub or the prompts can't be fetched.
    """
    most = _count(spec)
    chosen = choose(spec)
    copy: dict[str, Any] = {}
    data = _local(spec, folder) if folder is not None else _hub(spec, copy)
    dropped: Counter[str] = Counter()
    own = {
        name: [replace(e, group=f"{name} {e.group}") for e in _prompted(spec, rows, chosen, most, dropped)]
        for name, rows in _carved(data, fractions).items()
        if len(rows)
    }
    source = {
        "spec": spec.text, "source": "prompted", "from": "folder" if folder is not None else "Hub",
        "prompt_style": f"{PACKAGE.requirement}, as rendered", "templates": [t.name for t in chosen],
        **copy,
    }  # fmt: skip
    return build_task(f"prompted:{spec.name}{_suffix(spec)}", own, source, fractions, dropped)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    """As `TaskSource.check`."""
    _count(spec)
    known = True
    if folder is not None:
        files(spec, folder)
    else:
        known = check_splits(spec)
    if not is_available():
        return "promptsource's prompts, which aren't in the cache" + ("" if folder else ", and the Hub")
    choose(spec)
    return None if folder else "the Hub" if known else "splits that only the Hub knows"


def choose(spec: TaskSpec) -> list[Template]:
    """The templates that a spec asks for.

    Raises:
        UnknownName: there is no such dataset or template.
    """
    known = templates(spec.name)
    wanted = spec.options.get("templates", "all")
    without = [name for name in spec.options.get("without", "").split("|") if name]
    names = [] if wanted in ("all", "original") else wanted.split("|")
    for name in (*names, *without):
        if name not in known:
            raise unknown(f"template of {spec.name}", name, known)
    found = [known[n] for n in names] or [t for t in known.values() if wanted == "all" or t.original]
    kept = [t for t in found if t.name not in without]
    if not kept:
        raise TaskError(f"{spec.text} leaves no template.")
    return kept


def _suffix(spec: TaskSpec) -> str:
    """What tells several tasks on one dataset apart: ANLI's rounds are splits of one."""
    test = spec.options.get("test", "")
    return f"/{test}" if test and test not in SPLITS else ""


def _count(spec: TaskSpec) -> int:
    text = spec.options.get("rows", str(ROWS))
    if not text.isdigit() or int(text) < 1:
        raise TaskError(f"{spec.text}: rows must be a number of at least 1, got {text!r}.")
    return int(text)


def _hub(spec: TaskSpec, copy: dict[str, Any]) -> dict[SplitName, Rows]:
    """The chosen splits' rows. Into `copy` goes what the record says of a copy that was read in place of a script."""
    name, _, subset = spec.name.partition("/")
    options = {k: v for k, v in spec.options.items() if k in (*SPLITS, "revision")}
    if wanted := spec.options.get("subset", subset):
        options["config"] = wanted
    plain = TaskSpec("hf", spec.options.get("hub", name), options, spec.text)
    return dict(hf.choose_splits(hf.load_data(plain, source=copy), plain).items())


def _local(spec: TaskSpec, folder: Path) -> dict[SplitName, Rows]:
    return {split: [row for _, row in read_lines(path)] for split, path in files(spec, folder).items()}


def files(spec: TaskSpec, folder: Path) -> dict[SplitName, Path]:
    """The file of each split in a folder. A lone file of another split than train stands for the split it is asked for.

    Raises:
        TaskError: there is no folder, or no file of this dataset in it.
    """
    if not is_folder(folder, TaskError):
        raise TaskError(f"{folder} is not a folder; expected one with NAME.SPLIT.jsonl files.")
    stem = spec.options.get("files", config_name(spec.name))
    found: dict[SplitName, Path] = {}
    taken: set[Path] = set()
    for split in reversed(SPLITS):
        asked = spec.options.get(split, split)
        names = (asked, asked.split("_")[0], *_SPLIT_FILES.get(asked, ()))
        tries = [folder / f"{stem}.{n}{e}" for n in dict.fromkeys(names) for e in ENDINGS]
        path = next((p for p in tries if p.exists() and p not in taken), None)
        if path is not None:
            taken.add(path)
            found[split] = path
    if not found:
        raise TaskError(f"{folder} has no file {stem}.SPLIT.jsonl or .jsonl.gz, which {spec.text} needs.")
    return found


def _carved(data: dict[SplitName, Rows], fractions: Fractions) -> dict[SplitName, Rows]:
    """All three splits; those that the data lacks are taken from train, by the hash of the raw row."""
    missing = {name for name in SPLITS if name != "train" and not len(data.get(name, ()))}
    if not missing or not len(data.get("train", ())):
        return data
    parts: dict[SplitName, list[Mapping[str, Any]]] = {name: [] for name in SPLITS}
    for row in data["train"]:
        # Rendered rows of one raw row carry its number.
        key = str(row["i"]) if "i" in row and "completion" in row else sha256_json(_plain(row))
        place = fractions.place(position(key))
        parts[place if place in missing else "train"].append(row)
    return {name: parts[name] if name == "train" or name in missing else data[name] for name in SPLITS}


def _prompted(
    spec: TaskSpec, rows: Rows, chosen: Sequence[Template], most: int, dropped: Counter[str]
) -> list[Example]:
    """Examples of one split's rows, each with its raw row's number as its group."""
    if "template" in rows[0] and "completion" in rows[0]:
        return list(_rendered(rows, spec, chosen, most, dropped))
    examples = []
    for number in _sample(len(rows) * len(chosen), most):
        template = chosen[number % len(chosen)]
        row = to_hub_row(spec.name, rows[number // len(chosen)])
        made = example(template, row, spec.text, number // len(chosen))
        if isinstance(made, str):
            dropped[made] += 1
        else:
            examples.append(replace(made, group=str(number // len(chosen))))
    return examples


def example(template: Template, row: Mapping[str, Any], where: str, number: int) -> Example | str:
    """A row under a template; or why it has none: the template doesn't apply to it, or it has no answer.

    Raises:
        TaskError: the row lacks what the template reads, or breaks a rule of Example.
    """
    if row.get("label") == -1:  # how the Hub marks a row without its label
        return "unlabelled"
    choice = random.Random(f"{number}/{template.name}")
    rendered = template.render(row, choice)
    if rendered is None:
        return "not_applicable"
    prompt, target, choices = rendered
    if not prompt.strip():
        return "empty_prompt"
    if not target.strip():
        return "empty_target"
    ranked = choices is not None and target.strip() in choices and len(set(choices)) > 1 and "" not in choices
    try:
        return make_example(prompt, [target], choices if ranked else None)
    except ValueError as cause:
        raise TaskError(f"{where}, row {number}, template {template.name!r}: {cause}.") from cause


def _rendered(
    rows: Rows, spec: TaskSpec, chosen: Sequence[Template], most: int, dropped: Counter[str]
) -> Iterable[Example]:
    """Rows that were rendered elsewhere. Where all templates are asked for, templates of other versions are welcome."""
    names = {config_name(t.name) for t in chosen}
    without = {config_name(name) for name in spec.options.get("without", "").split("|")}
    every = spec.options.get("templates", "all") == "all"
    kept = [row for row in rows if _wanted(config_name(str(row["template"])), names, without, every)]
    dropped["other_template"] += len(rows) - len(kept)
    for number in _sample(len(kept), most):
        prompt, target = str(kept[number].get("prompt") or ""), str(kept[number].get("completion") or "")
        if prompt.strip() and target.strip():
            raw = kept[number].get("i", f"line {number}")  # without its raw row's number, a row is by itself
            yield replace(make_example(prompt, [target]), group=str(raw))
        else:
            dropped["empty_target"] += 1


def _wanted(template: str, names: set[str], without: set[str], every: bool) -> bool:
    return template not in without if every else template in names


def _sample(count: int, most: int) -> list[int]:
    """All of `count` numbers, or a fixed random `most` of them, in order."""
    if count <= most:
        return list(range(count))
    return sorted(int(i) for i in np.random.default_rng(0).choice(count, most, replace=False))


def _plain(row: Mapping[str, Any]) -> Any:
    return {key: str(value) for key, value in row.items()}


SOURCE = TaskSource(
    load, check, ("templates", "without", "hub", "subset", "revision", "files", "rows", *SPLITS)
)
