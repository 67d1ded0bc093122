"""`prompted:DATASET[/SUBSET]`: raw rows of a dataset under promptsource's prompts."""

from __future__ import annotations

import random
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from phatgoose.errors import TaskError
from phatgoose.files import sha256_json
from phatgoose.records import SPLITS, Example, SplitName, Task
from phatgoose.registry import unknown
from phatgoose.tasks.examples import Dropped, make_example, make_rendered_example
from phatgoose.tasks.sources import TaskSource, hf
from phatgoose.tasks.sources.local_files import check_folder, read_lines
from phatgoose.tasks.sources.promptsource import PACKAGE, Template, config_name, is_available, read_templates
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions, build_task, hash_fraction

ROWS = 500_000
ENDINGS = (".jsonl", ".jsonl.gz")
_SPLIT_FILES = {"validation": ("validation", "dev", "val"), "train": ("train",), "test": ("test",)}
_KNOWN = tomllib.loads(files("phatgoose.tasks.sources").joinpath("known_datasets.toml").read_text("utf-8"))
KNOWN_SPLITS: Mapping[str, list[str]] = _KNOWN["splits"]
"""DATASET[/SUBSET] → its splits on the Hub, of datasets that named pools and suites read."""

RawRows = Sequence[Mapping[str, Any]]


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """One dataset under its prompts."""
    most = spec.count("rows", ROWS)
    templates = choose_templates(spec)
    copy: dict[str, Any] = {}
    data: dict[SplitName, RawRows]
    if folder is None:
        data = _read_hub(spec, copy)
    else:
        data = {s: [row for _, row in read_lines(p)] for s, p in split_files(spec, folder).items()}
    dropped: Counter[str] = Counter()
    own = {
        name: [replace(e, group=f"{name} {e.group}") for e in _examples(spec, rows, templates, most, dropped)]
        for name, rows in _with_missing_splits(data, fractions).items()
        if len(rows)
    }
    source = {
        "from": "folder" if folder is not None else "Hub",
        "prompt_style": f"{PACKAGE.requirement}, as rendered",
        "templates": [t.name for t in templates],
        **copy,
    }
    # Several tasks may be splits of one dataset, as ANLI's rounds are: their names tell which.
    test = spec.options.get("test", "")
    suffix = f"/{test}" if test and test not in SPLITS else ""
    return build_task(f"prompted:{spec.name}{suffix}", own, source, fractions, dropped)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    spec.count("rows", ROWS)
    known = True
    if folder is not None:
        split_files(spec, folder)
    else:
        known = check_splits(spec)
    if not is_available():
        return "promptsource's prompts, which aren't in the cache" + ("" if folder else ", and the Hub")
    choose_templates(spec)
    return None if folder else "the Hub" if known else "splits that only the Hub knows"


def choose_templates(spec: TaskSpec) -> list[Template]:
    """The templates that a spec asks for. Raises UnknownName if the dataset or a template isn't there."""
    known = read_templates(spec.name)
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


def _read_hub(spec: TaskSpec, copy: dict[str, Any]) -> dict[SplitName, RawRows]:
    """The chosen splits' rows. The copy that was read instead of a dataset script, if any, is added to `copy`."""
    name, _, subset = spec.name.partition("/")
    options = {k: v for k, v in spec.options.items() if k in (*SPLITS, "revision")}
    if wanted := spec.options.get("subset", subset):
        options["config"] = wanted
    plain = TaskSpec("hf", spec.options.get("hub", name), options, spec.text)
    return hf.choose_splits(hf.load_data(plain, source=copy), plain)


def split_files(spec: TaskSpec, folder: Path) -> dict[SplitName, Path]:
    """The file of each split in a folder, by the name that the spec gives the split; dev and val count as validation.

    Each file is used once: first for test, then for validation, then for train.

    Raises:
        TaskError: there is no folder, or no file of this dataset in it.
    """
    check_folder(folder, "NAME.SPLIT.jsonl files")
    stem = spec.options.get("files", config_name(spec.name))
    found: dict[SplitName, Path] = {}
    for split in reversed(SPLITS):
        asked = spec.options.get(split, split)
        names = (asked, asked.split("_")[0], *_SPLIT_FILES.get(asked, ()))
        paths = [folder / f"{stem}.{n}{e}" for n in dict.fromkeys(names) for e in ENDINGS]
        path = next((p for p in paths if p.exists() and p not in found.values()), None)
        if path is not None:
            found[split] = path
    if not found:
        raise TaskError(f"{folder} has no file {stem}.SPLIT.jsonl or .jsonl.gz, which {spec.text} needs.")
    return found


def check_splits(spec: TaskSpec) -> bool:
    """Checks the splits that a `prompted:` spec asks for; False if those of its dataset aren't known.

    Raises:
        UnknownName: the spec names a split that the dataset doesn't have.
        TaskError: the spec names no split, and the dataset has none called train, validation or test.
    """
    if spec.name not in KNOWN_SPLITS or spec.options.keys() & {"hub", "subset", "revision"}:
        return False
    known = KNOWN_SPLITS[spec.name]
    asked = [spec.options[name] for name in SPLITS if name in spec.options]
    for name in asked:
        if name not in known:
            raise unknown(f"split of {spec.name}", name, known)
    if not asked and not set(known) & set(SPLITS):
        raise TaskError(f"{spec.text}: {spec.name} has the splits {', '.join(known)}; say which with test=.")
    return True


def to_hub_row(dataset: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` of `dataset` (promptsource's name) with the Hub's column names and label numbers.

    A row that has them is unchanged.
    """
    found = dict(row)
    for published, name in _KNOWN["columns"].get(dataset, {}).items():
        if published in found and name not in found:
            found[name] = found.pop(published)
    nested = _KNOWN["nested"].get(dataset)
    if isinstance(found.get(nested), Mapping):
        found.update(found.pop(nested))
    label, words = found.get("label"), _KNOWN["labels"].get(dataset, ())
    if isinstance(label, str | bool) and (word := str(label).lower()) in words:
        found["label"] = words.index(word)
    return found


def _with_missing_splits(data: dict[SplitName, RawRows], fractions: Fractions) -> dict[SplitName, RawRows]:
    """All three splits; those that the data lacks are taken from train, by the hash of the raw row."""
    missing = {name for name in SPLITS if name != "train" and not len(data.get(name, ()))}
    if not missing or not len(data.get("train", ())):
        return data
    parts: dict[SplitName, list[Mapping[str, Any]]] = {name: [] for name in SPLITS}
    for row in data["train"]:
        # Rendered rows of one raw row carry its number.
        rendered = "i" in row and "completion" in row
        key = str(row["i"]) if rendered else sha256_json({k: str(v) for k, v in row.items()})
        split = fractions.split_of(hash_fraction(key))
        parts[split if split in missing else "train"].append(row)
    return {name: parts[name] if name == "train" or name in missing else data[name] for name in SPLITS}


def _examples(
    spec: TaskSpec, rows: RawRows, templates: Sequence[Template], most: int, dropped: Counter[str]
) -> Iterator[Example]:
    """Examples of one split's rows, each with its raw row's number as its group."""
    if "template" in rows[0] and "completion" in rows[0]:
        yield from _rendered_examples(rows, spec, templates, most, dropped)
        return
    # Pairs of row and template are numbered row by row, so that a sample of the numbers is one of the pairs.
    for pair in _sample(len(rows) * len(templates), most):
        number, template = pair // len(templates), templates[pair % len(templates)]
        try:
            example = render_example(template, to_hub_row(spec.name, rows[number]), number)
        except Dropped as cause:
            dropped[cause.reason] += 1
        except ValueError as cause:
            where = f"{spec.text}, row {number}, template {template.name!r}"
            raise TaskError(f"{where}: {cause}.") from cause
        else:
            yield replace(example, group=str(number))


def render_example(template: Template, row: Mapping[str, Any], number: int) -> Example:
    """Row `number` under a template.

    Raises:
        Dropped: the template doesn't apply to the row, or the row has no answer.
        TaskError: the row lacks what the template reads.
        ValueError: it breaks a rule of Example.
    """
    if row.get("label") == -1:  # how the Hub marks a row without its label
        raise Dropped("unlabelled")
    rendered = template.render(row, random.Random(f"{number}/{template.name}"))
    if rendered is None:
        raise Dropped("not_applicable")
    prompt, target, choices = rendered
    if not prompt.strip():
        raise Dropped("empty_prompt")
    if not target.strip():
        raise Dropped("empty_target")
    return make_rendered_example(prompt, target, choices)


def _rendered_examples(
    rows: RawRows, spec: TaskSpec, templates: Sequence[Template], most: int, dropped: Counter[str]
) -> Iterator[Example]:
    """Examples of rows that were rendered elsewhere; with templates=all, under whatever template."""
    names = {config_name(t.name) for t in templates}
    without = {config_name(name) for name in spec.options.get("without", "").split("|")}
    every = spec.options.get("templates", "all") == "all"

    def is_wanted(template: str) -> bool:
        return template not in without if every else template in names

    kept = [row for row in rows if is_wanted(config_name(str(row["template"])))]
    dropped["other_template"] += len(rows) - len(kept)
    for number in _sample(len(kept), most):
        prompt, target = str(kept[number].get("prompt") or ""), str(kept[number].get("completion") or "")
        if prompt.strip() and target.strip():
            # A row without its raw row's number is a group of its own.
            raw = kept[number].get("i", f"line {number}")
            yield replace(make_example(prompt, [target]), group=str(raw))
        else:
            dropped["empty_target"] += 1


def _sample(count: int, most: int) -> list[int]:
    """All of `count` numbers, or a fixed random `most` of them, in order."""
    if count <= most:
        return list(range(count))
    return sorted(int(i) for i in np.random.default_rng(0).choice(count, most, replace=False))


SOURCE = TaskSource(
    load, check, ("templates", "without", "hub", "subset", "revision", "files", "rows", *SPLITS)
)
