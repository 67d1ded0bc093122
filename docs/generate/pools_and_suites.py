"""docs/pools-and-suites.md, written from the lists themselves by `cli.py`.

There is one table for each source, since what there is to say of an entry depends on its source. A new pool or
suite of these sources needs no change here.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import takewhile

from phatgoose.cli.measure.tasks import remarks
from phatgoose.tasks.lists.entries import Entry
from phatgoose.tasks.lists.named import (
    POOLS,
    SUITES,
    Suite,
    pool_entries,
    pool_excluded,
    pool_tasks_of,
    suite,
)
from phatgoose.tasks.sources import bbh, flan
from phatgoose.tasks.sources.bigbench_files import PACKAGE as BIGBENCH
from phatgoose.tasks.spec import TaskSpec, split_spec

HEAD = f"""\
# Pools and suites

Written by `python docs/generate/cli.py` from the lists themselves: change those, not this page. \
`phatgoose tasks pool NAME` and
`phatgoose tasks suite NAME` print the same. \
[Experiments](experiments.md#pools-and-suites-under-names) use them.

| column | |
|---|---|
| expert | its name in the pool, as a recipe's `[pool] only` and `leave_out` take it |
| task | its name in the suite, and in tables of results |
| dataset, config | on the Hub; ids are the authors', and some may have moved |
| test split | the dataset's split that is measured; empty: its own test split, or else a part of train. \
An expert's validation rows are taken from train |
| prompts | promptsource's: all of the dataset's, or the original task's only |
| FLAN | COLLECTION/TASK of `{flan.HUB}`; a category of `niv2` needs a folder. \
Experts' tasks are [split by the rule](tasks.md#splits) |
| BIG-bench | tasks of `{BIGBENCH.requirement}` on PyPI; several are put together. \
Experts' tasks are [split by the rule](tasks.md#splits); \
of a suite's tasks, seven rows of ten are test rows, and the others are there to choose experts by |
| note | also skill and domain of a task, its tier in the suite, and the experts that should help on it |
| BIG-bench Hard | files of `{bbh.HUB}` on the Hub; all rows are test rows, \
and those after the measured ones are there to choose experts by |
"""
HUB_COLUMNS = ("dataset", "config", "test split", "prompts")
COLUMNS = {
    "prompted": HUB_COLUMNS,
    "hf": HUB_COLUMNS,
    "flan": ("FLAN",),
    "bigbench": ("BIG-bench",),
    "bbh": ("BIG-bench Hard",),
}
"""What is said of an entry, by the source of its specs."""


def markdown() -> str:
    """The whole page."""
    pools = [line for name in POOLS for line in _pool(name)]
    suites = [line for name in SUITES for line in _suite(suite(name))]
    return "\n".join([HEAD, *pools, *suites]).rstrip() + "\n"


def _pool(name: str) -> Iterator[str]:
    entries = pool_entries(name)
    if tasks_of := pool_tasks_of(name):
        yield f"## Pool {name}\n"
        yield f"{len(entries)} experts: each on the training rows of a task of [suite {tasks_of}](#suite-{tasks_of}).\n"
        return
    inside = _pools_within(name)
    known = {e for other in inside for e in pool_entries(other)}
    links = ", ".join(f"all {len(pool_entries(n))} of [pool {n}](#pool-{n})" for n in inside)
    yield f"## Pool {name}\n"
    yield f"{len(entries)} experts{f': {links}, and these' if inside else ''}.\n"
    yield from _tables("expert", [e for e in entries if e not in known])
    if excluded := pool_excluded(name):
        yield "Left out as near-duplicates of held-out tasks:\n"
        yield from _table(["BIG-bench", "why"], [(_code(task), why) for task, why in excluded.items()])


def _pools_within(name: str) -> list[str]:
    """Pools listed before this one that are whole in it: they aren't listed twice."""
    entries = set(pool_entries(name))
    return [other for other in takewhile(lambda n: n != name, POOLS) if set(pool_entries(other)) <= entries]


def _suite(found: Suite) -> Iterator[str]:
    yield f"## Suite {found.name}\n"
    yield f"{len(found.entries)} tasks.\n"
    yield from _tables("task", found.entries, found.own_copy)
    if found.refuses:
        yield "Refused too for a pool with experts on these datasets:\n"
        yield "\n".join(f"- `{dataset}`" for dataset in sorted(found.refuses)) + "\n"


def _tables(first: str, entries: Sequence[Entry], own_copy: Sequence[str] = ()) -> Iterator[str]:
    """A table for each kind of source, in the order of its first entry; columns that would be empty are left out."""
    by_columns: dict[tuple[str, ...], list[list[str]]] = {}
    for entry in entries:
        specs = [split_spec(spec) for spec in entry.specs]
        (source,) = {spec.source for spec in specs}
        row = [_code(entry.name), *_cells(source, specs), remarks(entry, own_copy)]
        by_columns.setdefault(COLUMNS[source], []).append(row)
    for columns, rows in by_columns.items():
        named = [first, *columns, "note"]
        used = [place for place in range(len(named)) if any(row[place] for row in rows)]
        yield from _table([named[p] for p in used], [[row[p] for p in used] for row in rows])


def _cells(source: str, specs: Sequence[TaskSpec]) -> list[str]:
    """What an entry of these specs reads, under the columns of their source."""
    if COLUMNS[source] == HUB_COLUMNS:
        (spec,) = specs
        return [*_on_hub(spec), spec.options.get("test", ""), _prompts(spec)]
    return [", ".join(_code(spec.name) + _options(spec) for spec in specs)]


def _on_hub(spec: TaskSpec) -> list[str]:
    """The Hub's id of a dataset, and its config if one is named."""
    if spec.source == "hf":
        return [_code(spec.name), _code(spec.options.get("config", ""))]
    name, _, subset = spec.name.partition("/")
    return [_code(spec.options.get("hub", name)), _code(spec.options.get("subset", subset))]


def _prompts(spec: TaskSpec) -> str:
    """Which of promptsource's; none for `hf:`, whose prompt is the spec's own."""
    if spec.source == "hf":
        return ""
    without = [_code(name) for name in spec.options.get("without", "").split("|") if name]
    return spec.options.get("templates", "all") + (f" but {', '.join(without)}" if without else "")


def _options(spec: TaskSpec) -> str:
    """Behind a task's name: how its rows are read otherwise than by default."""
    said = [_code(f"{key}={value}") for key, value in spec.options.items()]
    return f" ({', '.join(said)})" if said else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    yield "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in rows) + "\n"


def _escaped(cell: str) -> str:
    """A bar would end the cell."""
    return cell.replace("|", "&#124;")


def _code(text: str) -> str:
    """As code; with a bar as HTML, since renderers differ in how one is written between backticks in a table."""
    if not text:
        return ""
    return f"<code>{html.escape(text)}</code>" if "|" in text else f"`{text}`"
