"""Entries of pools and suites: tasks of one or several specs, and checks for shared data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, Example, SplitName, Task, groups_of
from phatgoose.tasks.contamination import ContaminationCheck, hash_runs
from phatgoose.tasks.lists.same_dataset import Dataset, datasets_of, shared_datasets
from phatgoose.tasks.load import SOURCES, find_source, load_task
from phatgoose.tasks.narrow import with_rows
from phatgoose.tasks.sources.prompted import ROWS
from phatgoose.tasks.spec import split_spec
from phatgoose.tasks.splits import Fractions, build_task

Folders = Mapping[str, str | Path]
"""Folders to read data from instead of fetching it: by the name of a task, of a suite or pool, or of a source
(bigbench, prompted, …)."""

SAME_DATASET = "templates"
"""The tier of a suite's tasks that are test rows of an expert's own dataset, under another prompt."""
TIERS = (SAME_DATASET, "sisters", "unrelated")
APART_WORDS = 8
"""Words in a row that two rows may not share under `apart_from`; fewer than for the report of contamination, since
these are dropped, and most such rows are short."""
APART_LINE = 4
"""A whole line of at least so many words, and fewer than APART_WORDS, may not be shared either."""


@dataclass(frozen=True)
class Entry:
    """One task under a name of its own."""

    name: str
    """The expert's name, or the column's in a table of results."""
    specs: tuple[str, ...]
    """Specs whose rows together make the task."""
    metric: str | None = None
    """Metric of rows without choices, if not exact match: "rougeL"."""
    note: str = ""
    """How it differs from the task that it is named after."""
    tier: str = ""
    """How far a suite's task is from the pool, one of TIERS."""
    sisters: tuple[str, ...] = ()
    """The experts that should help on it, named before anything is measured; of the tier "templates", the expert of
    its dataset."""
    cluster: str = ""
    """Tasks of one cluster aren't independent samples of tasks."""
    skill: str = ""
    """What it asks for; its sisters have the same."""
    domain: str = ""
    """What its texts are about, or where they are from."""
    fractions: tuple[float, float] | None = None
    """Test and validation fractions wherever it is loaded, if the data has no splits of its own: an expert on its
    training rows then sees none that a suite measures. None: the caller's."""
    apart_from: tuple[str, ...] = ()
    """Specs of tasks with which it shares no text: its rows are dropped, and counted as "shared", that have APART_WORDS
    words in a row in common with any of their rows (prompts and all targets), or hold a shorter line of theirs, from
    APART_LINE words on. Words that are part of its own prompt don't count (`tasks/contamination.py`)."""

    def __post_init__(self) -> None:
        if self.tier not in ("", *TIERS):
            raise TaskError(f"{self.name}: tier is {self.tier!r}, expected one of {', '.join(TIERS)}.")
        if (self.tier == "unrelated") == bool(self.sisters) and self.tier:
            raise TaskError(
                f"{self.name}: sisters go with the tiers {TIERS[0]} and {TIERS[1]}, and only with these."
            )

    def datasets(self, folders: Folders, group: str = "") -> frozenset[Dataset]:
        """The datasets that its specs read, under common names (`same_dataset.py`); `group` as for `load_entry`."""
        found = [datasets_of(spec, folder_for(spec, (self.name, group), folders)) for spec in self.specs]
        return frozenset[Dataset]().union(*found)


def load_entry(
    entry: Entry,
    *,
    group: str = "",
    folders: Folders | None = None,
    fractions: Fractions | None = None,
    limit: int | Mapping[SplitName, int] | None = None,
    needed: int | None = None,
) -> Task:
    """The entry as one Task, named after the entry. The rows of several specs are put together, each prompt in
    one split only.

    Args:
        group: the entry's pool or suite. A folder given for the entry wins over one for its group, and that
            over one for the source.
        limit: as for `load_task`, for the whole entry: several specs get equal shares of it, as far as they have rows.
        needed: how many rows of a split are wanted, for sources that render each row. None: the largest `limit`.

    Raises:
        TaskError, UnknownName, DownloadError: as `load_task`.
    """
    fractions, parts = fractions or Fractions(), []
    if entry.fractions is not None:
        fractions = Fractions(*entry.fractions)
    most = needed or (limit if isinstance(limit, int) else max((limit or {}).values(), default=0))
    shared = _rows_near(entry, group, folders or {})
    for spec in entry.specs:
        folder = folder_for(spec, (entry.name, group), folders or {})
        own_limit = limit if shared is None else None  # the first rows are taken of those that stay
        part = load_task(_with_row_limit(spec, most), folder=folder, fractions=fractions, limit=own_limit)
        parts.append(part if shared is None else _apart(part, shared, limit))
    task = parts[0] if len(parts) == 1 else _union(entry, _within(parts, limit), fractions)
    source = task.source | ({"metric": entry.metric} if entry.metric else {})
    return replace(task, name=entry.name, source=source)


def folder_for(spec: str, names: Sequence[str], folders: Folders) -> str | Path | None:
    """The folder of a spec's data: that of the first of `names` (the entry's, its pool's or suite's) with a
    folder, else its source's. None: the data is fetched.

    Some names are a suite's or pool's and a source's ("bbh", "bigbench", "flan"). A folder under such a name
    is the source's: the suite also has tasks of other sources, whose data isn't there.
    """
    own = next((folders[name] for name in names if name in folders and name not in SOURCES), None)
    return own or folders.get(split_spec(spec).source)


def check_no_shared_data(
    pool: Sequence[Entry],
    held_out: Sequence[Entry],
    refused: frozenset[str],
    suite: str,
    folders: Folders | None = None,
) -> None:
    """Refuses a suite for a pool that was trained on its data, as far as names of datasets tell.

    Args:
        refused: names of further datasets that no expert may hold, since they contain the suite's own.
        folders: the folders of both.

    Raises:
        TaskError: naming the experts and the datasets.
    """
    folders = folders or {}
    named = {Dataset(name) for name in refused}
    found = {}
    for e in pool:
        # Rows of its own dataset's test split, under another prompt, are no reason to refuse an expert.
        others = [one for one in held_out if one.tier != SAME_DATASET or e.name not in one.sisters]
        wanted = named.union(*(one.datasets(folders, suite) for one in others))
        if both := shared_datasets(e.datasets(folders), wanted):
            found[e.name] = both
    if found:
        listed = "; ".join(f"{name} ({', '.join(map(str, d))})" for name, d in list(found.items())[:6])
        more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
        raise TaskError(
            f"suite {suite!r} is for models that never saw its data, and {len(found)} of the pool's experts "
            f"were trained on it: {listed}{more}. Leave out the suite or those experts."
        )


def with_validation(task: Task, test_rows: int, validation_rows: int) -> Task:
    """`task` with validation rows. If it has none, they are the test rows after the first `test_rows`; test
    rows are in random order.

    If these are fewer than `validation_rows`, up to 3 of 10 test rows are taken. Where raw rows are shown
    under several prompts, no raw row is on both sides: the validation rows are all prompts of the raw rows
    that the first test rows don't show, and at most 9 in 10 raw rows are measured. So there may be fewer than
    `validation_rows`; a single raw row leaves none.
    """
    if task.validation or not validation_rows or len(task.test) < 2:
        return task
    rows, raw = task.test, list(dict.fromkeys(groups_of(task.test)))
    if len(raw) == len(rows):
        kept = min(test_rows, max(1, len(rows) * 7 // 10, len(rows) - validation_rows))
        test, rest, behind = rows[:kept], rows[kept:], "rows behind the test rows"
    else:
        shown = len(set(groups_of(rows[:test_rows])))
        measured = set(raw[: min(shown, max(1, min(len(raw) - 1, len(raw) * 9 // 10)))])
        sides = [group in measured for group in groups_of(rows)]
        test = tuple(e for e, in_test in zip(rows, sides, strict=True) if in_test)[:test_rows]
        rest = tuple(e for e, in_test in zip(rows, sides, strict=True) if not in_test)
        behind = "raw rows behind the test rows'"
    if not rest:
        return task
    return replace(task, test=test, validation=rest, source=task.source | {"validation": behind})


def _with_row_limit(spec: str, most: int) -> str:
    """The spec with `rows=`, if its source has that option: rendering every row under every prompt is slow."""
    parsed = split_spec(spec)
    if "rows" not in find_source(parsed.source).options or "rows" in parsed.options or not most:
        return spec
    # Ten times as many as wanted, since duplicates are dropped and three splits are made of them; at most
    # the sources' own limit.
    return f"{spec}{'&' if '?' in spec else '?'}rows={max(most, min(10 * most, ROWS))}"


def _rows_near(entry: Entry, group: str, folders: Folders) -> list[Example] | None:
    """All rows that the entry may share no text with; None if it names none."""
    if not entry.apart_from:
        return None
    tasks = [load_task(s, folder=folder_for(s, (entry.name, group), folders)) for s in entry.apart_from]
    return [example for task in tasks for split in SPLITS for example in task.split(split)]


def _apart(task: Task, near: Sequence[Example], limit: int | Mapping[SplitName, int] | None) -> Task:
    """The task without the rows that share text with any of `near`, and then with at most `limit` rows a split."""
    rows = [(e, one) for name in SPLITS for e in task.split(name) for one in _one_target_each(e)]
    theirs = [one for e in near for one in _one_target_each(e)]
    lines = {line for e in theirs for line in (*e.input.splitlines(), e.targets[0])}
    flagged: set[int] = set()
    for words in range(APART_LINE, APART_WORDS + 1):
        check = ContaminationCheck(words)
        check.add_held_out(task.name, [one for _, one in rows])
        whole = (Example(line, ("",)) for line in lines if len(hash_runs(line, 1)) == words)
        check.compare("", theirs if words == APART_WORDS else whole)
        flagged |= {id(rows[number][0]) for number in check.results[0].flagged_rows}
    splits = {name: tuple(e for e in task.split(name) if id(e) not in flagged) for name in SPLITS}
    task = with_rows(task, splits, {"shared": len(flagged)})
    return task.cut(dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else limit or {})


def _one_target_each(example: Example) -> list[Example]:
    """The example once for each of its targets, since texts are compared with the first target alone."""
    return [replace(example, targets=(target,), answers=()) for target in example.targets]


def _within(parts: Sequence[Task], limit: int | Mapping[SplitName, int] | None) -> list[Task]:
    """The parts with at most `limit` rows together: the first ones of each, which are a random sample."""
    limits = dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else limit or {}
    shares = {name: even_shares([len(t.split(name)) for t in parts], most) for name, most in limits.items()}
    return [part.cut({name: of[i] for name, of in shares.items()}) for i, part in enumerate(parts)]


def even_shares(sizes: Sequence[int], most: int) -> list[int]:
    """How many to take of each size, evenly, for at most `most` together. The first ones get a remainder."""
    shares, left = [0] * len(sizes), most
    # From the smallest on: what one can't use of its share is left for those after it.
    for done, i in enumerate(sorted(range(len(sizes)), key=lambda i: (sizes[i], -i))):
        shares[i] = min(sizes[i], left // (len(sizes) - done))
        left -= shares[i]
    return shares


def _union(entry: Entry, parts: Sequence[Task], fractions: Fractions) -> Task:
    own: dict[SplitName, list[Example]] = {
        name: [_with_part(e, number) for number, t in enumerate(parts) for e in t.split(name)]
        for name in SPLITS
    }
    source = {"spec": " + ".join(entry.specs), "source": "union", "parts": [t.source for t in parts]}
    source["prompt_style"] = "each part's own"
    return build_task(entry.name, own, source, fractions)


def _with_part(example: Example, number: int) -> Example:
    """The example with its part's number in its group: raw rows of two parts may have the same number."""
    return example if example.group is None else replace(example, group=f"{number} {example.group}")
