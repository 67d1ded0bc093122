"""What `prompted:` knows of datasets: their splits, and rows as authors published them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS
from phatgoose.registry import unknown
from phatgoose.tasks.spec import TaskSpec

_TABLES = tomllib.loads(files("phatgoose.tasks.sources").joinpath("known_datasets.toml").read_text("utf-8"))
KNOWN_SPLITS: Mapping[str, list[str]] = _TABLES["splits"]
"""DATASET[/SUBSET] → its splits on the Hub."""


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
    """`row` of `dataset` (promptsource's name) with the Hub's column names and label numbers; a row that has
    them is unchanged."""
    found = dict(row)
    for published, name in _TABLES["columns"].get(dataset, {}).items():
        if published in found and name not in found:
            found[name] = found.pop(published)
    nested = _TABLES["nested"].get(dataset)
    if isinstance(found.get(nested), Mapping):
        found.update(found.pop(nested))
    label, words = found.get("label"), _TABLES["labels"].get(dataset, ())
    if isinstance(label, str | bool) and (word := str(label).lower()) in words:
        found["label"] = words.index(word)
    return found
