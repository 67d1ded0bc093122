"""Which datasets a task's spec reads, under names that are the same for every source.

`super_glue/rte` is what `prompted:super_glue/rte`, `hf:aps/super_glue?config=rte`,
`flan:flan2021/super_glue/rte:1.0.2` and P3's configurations `super_glue_rte_…` read. BIG-bench's tasks are
`bigbench/TASK/SUBTASK`, also those that BIG-bench Hard published under other names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phatgoose.errors import TaskError
from phatgoose.tasks.load import is_local
from phatgoose.tasks.sources.bbh import NAMES
from phatgoose.tasks.spec import TaskSpec, split_spec

NATURAL_INSTRUCTIONS = "natural-instructions"
"""One dataset for all categories of Natural Instructions, which hold tasks built on many datasets."""
_HARD_RENAMED = {
    "causal_judgement": "causal_judgment",
    "formal_fallacies": "formal_fallacies_syllogisms_negation",
}
_HARD_SIZED = ("logical_deduction", "tracking_shuffled_objects")
# Names of copies on the Hub.
_HARD_COPIES = frozenset({"bbh", "bigbenchhard", "big_bench_hard", "big-bench-hard"})
_OWNERLESS = frozenset({"bigbench", "p3", NATURAL_INSTRUCTIONS})
_INSTRUCTIONS_COPIES = frozenset(
    {NATURAL_INSTRUCTIONS, "natural_instructions", "super_natural_instructions", "super-natural-instructions"}
)


@dataclass(frozen=True, order=True)
class Dataset:
    """A dataset or a part of one, as DATASET/PART."""

    name: str
    """In lower case: "bigbench/hyperbaton", "super_glue/rte", "p3/configuration". A local file's is its path."""
    owner: str = ""
    """Its owner on the Hub, if the spec names one. Empty for collections that many have copied (BIG-bench, P3,
    Natural Instructions)."""

    def __str__(self) -> str:
        return self.name

    def overlaps(self, other: Dataset) -> bool:
        """True if both are the same, or one is a part of the other, as bigbench/logical_deduction/three_objects of
        bigbench/logical_deduction.

        Datasets of different owners differ. A dataset without an owner is known by its name, and others of
        that name are copies. P3's configurations are DATASET_PROMPT, with _ for /; two of them only overlap if
        they are equal.
        """
        if self.owner and other.owner and self.owner != other.owner:
            return False
        one, two = self.name, other.name
        if one.startswith("p3/") != two.startswith("p3/"):
            config, dataset = (one, two) if one.startswith("p3/") else (two, one)
            return f"{config[3:]}_".startswith(f"{dataset.replace('/', '_')}_")
        return f"{one}/".startswith(f"{two}/") or f"{two}/".startswith(f"{one}/")


def datasets_of(spec: str, folder: str | Path | None = None) -> frozenset[Dataset]:
    """The dataset that a spec reads, where relative paths start at `folder`. Raises TaskError for a malformed spec.

    Two for Hub names that can be read in two ways: `hf:super_glue/rte` may be a part of super_glue, or the dataset rte
    of an owner named super_glue.
    """
    parsed, local = split_spec(spec), is_local(spec)
    if parsed.source == "hf" or local:
        path = os.path.join(folder or "", os.path.expanduser(parsed.name))
        if "\0" in path:
            raise TaskError(f"{spec!r} can't name a file: it holds a null character.")
        there = local or os.path.exists(path)
        file = frozenset({Dataset(os.path.realpath(path))}) if there else frozenset()
        return file if local else _on_hub(parsed) | file
    source, name = parsed.source, parsed.name.lower()
    if source == "bbh":
        return frozenset({Dataset(f"bigbench/{bigbench_name(name)}")})
    if source == "flan":
        collection, _, task = name.partition("/")
        return frozenset({Dataset(NATURAL_INSTRUCTIONS if collection == "niv2" else task.partition(":")[0])})
    return frozenset({Dataset(name if source == "prompted" else f"{source}/{name}")})


def _on_hub(spec: TaskSpec) -> frozenset[Dataset]:
    """`name`, `owner/name`, `name/CONFIG` or `owner/name/CONFIG`."""
    parts, config = spec.name.lower().split("/"), spec.options.get("config", "").lower()
    named = [config] if config else []
    if len(parts) == 1:
        return frozenset({Dataset(_hub_name([*parts, *named]))})
    name = _hub_name([*parts[1:], *named])
    owned = Dataset(name, owner="" if name.partition("/")[0] in _OWNERLESS else parts[0])
    if len(parts) > 2 or config:
        return frozenset({owned})
    return frozenset({owned, Dataset(_hub_name(parts))})


def _hub_name(parts: list[str]) -> str:
    """DATASET/CONFIG of the Hub under the name that other sources give it."""
    dataset, rest = parts[0], "/".join(parts[1:])
    if dataset in _HARD_COPIES:
        return f"bigbench/{bigbench_name(rest)}" if rest else "bigbench"
    if dataset in _INSTRUCTIONS_COPIES:
        return NATURAL_INSTRUCTIONS
    if dataset == "bigbench":
        rest = rest.removesuffix("_zero_shot")
    return f"{dataset}/{rest}" if rest else dataset


def bigbench_name(published: str) -> str:
    """The BIG-bench task that a file of BIG-bench Hard takes its rows from."""
    sized = next(
        (task for task in _HARD_SIZED if published in NAMES and published.startswith(f"{task}_")), None
    )
    return sized or _HARD_RENAMED.get(published, published)


def shared_datasets(ours: Iterable[Dataset], theirs: Iterable[Dataset]) -> list[Dataset]:
    """Those of `ours` that overlap with any of `theirs`, sorted."""
    wanted = set(theirs)
    return sorted({one for one in ours if any(one.overlaps(other) for other in wanted)})
