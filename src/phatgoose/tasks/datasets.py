"""Which datasets a task's spec reads, under names that are the same whichever source they come from.

`super_glue/rte` is what `prompted:super_glue/rte`, `hf:aps/super_glue?config=rte`, `flan:flan2021/super_glue/rte:1.0.2` and the configurations
`super_glue_rte_…` of P3 read; BIG-bench's tasks are `bigbench/TASK/SUBTASK`, also those that BIG-bench Hard published under other names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from phatgoose.tasks.bbh import NAMES
from phatgoose.tasks.spec import is_local, split_spec

NATURAL_INSTRUCTIONS = "natural-instructions"
"""The dataset of all its categories: they hold tasks built on many datasets, and aren't searched one by one."""
_RENAMED = {"causal_judgement": "causal_judgment", "formal_fallacies": "formal_fallacies_syllogisms_negation"}
_SIZED = ("logical_deduction", "tracking_shuffled_objects")


def dataset_of(spec: str) -> str:
    """The dataset that a spec reads: "bigbench/hyperbaton", "super_glue/rte", "p3/CONFIGURATION", of a local file its whole path.

    Raises:
        TaskError: `spec` is none.
    """
    parsed = split_spec(spec)
    source, name = parsed.source, parsed.name
    if is_local(spec):
        return os.path.abspath(os.path.expanduser(name))
    if source == "hf":
        name = "/".join([name.rpartition("/")[2], *filter(None, [parsed.options.get("config")])])
        source, _, rest = name.partition("/")
        if source.lower() not in ("bbh", "p3") or not rest:
            return name.lower()
        source, name = source.lower(), rest
    if source == "bbh":
        return f"bigbench/{bigbench_name(name)}"
    if source == "flan":
        collection, _, task = name.partition("/")
        return NATURAL_INSTRUCTIONS if collection == "niv2" else task.partition(":")[0].lower()
    return name.lower() if source == "prompted" else f"{source}/{name}"


def bigbench_name(published: str) -> str:
    """The BIG-bench task whose rows a file of BIG-bench Hard has."""
    sized = next((task for task in _SIZED if published in NAMES and published.startswith(f"{task}_")), None)
    return sized or _RENAMED.get(published, published)


def shared(ours: Iterable[str], theirs: Iterable[str]) -> list[str]:
    """Those of `ours` that are among `theirs`, hold one of them or are a part of one, sorted."""
    wanted = set(theirs)
    return sorted({one for one in ours if any(_meet(one, other) for other in wanted)})


def _meet(one: str, other: str) -> bool:
    """Equal, or one a part of the other: bigbench/logical_deduction and bigbench/logical_deduction/three_objects.

    P3's configurations are DATASET_PROMPT, with _ for /; of two of them nothing but equality is known.
    """
    if one.startswith("p3/") != other.startswith("p3/"):
        config, dataset = (one, other) if one.startswith("p3/") else (other, one)
        return f"{config[3:].lower()}_".startswith(f"{dataset.replace('/', '_')}_")
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")
