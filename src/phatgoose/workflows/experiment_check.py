"""What can be said of a recipe's data before anything is loaded or fetched: names, splits, prompts, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from phatgoose.errors import PhatgooseError
from phatgoose.tasks import bbh, bigbench_files, prompted, templates
from phatgoose.tasks.entries import Entry, folder_for
from phatgoose.tasks.known_splits import check_splits
from phatgoose.tasks.spec import TaskSpec, is_local, split_spec
from phatgoose.workflows.experiment_recipe import IN_POOL, ExperimentRecipe, without_own_copies


@dataclass
class Checked:
    """What was found."""

    problems: dict[str, str] = field(default_factory=dict)
    """Task → why a run can't load it."""
    prompts: dict[str, int] = field(default_factory=dict)
    """Dataset → how many prompts its rows are shown under."""
    unknown: dict[str, list[str]] = field(default_factory=dict)
    """What couldn't be looked into → the tasks that need it."""


def check_data(recipe: ExperimentRecipe) -> Checked:
    """Looks up every task of the pool and of the suites in what is at hand; nothing is fetched, no row is read."""
    found = Checked()
    for suite in recipe.suites:
        kept, missing = without_own_copies(recipe, suite)
        for name in missing:
            found.unknown.setdefault("your own copies, without which they are left out", []).append(name)
        if suite.name != IN_POOL:
            for entry in kept.entries:
                _check(found, recipe, entry, suite.name)
    for entry in recipe.pool_entries:
        _check(found, recipe, entry, recipe.group_of(entry.name))
    return found


def _check(found: Checked, recipe: ExperimentRecipe, entry: Entry, group: str) -> None:
    for spec in entry.specs:
        given = folder_for(spec, (entry.name, group), recipe.folders)
        folder = None if given is None else Path(given).expanduser()
        parsed = split_spec(spec)
        try:
            for what in _LOOK[parsed.source](parsed, folder, found):
                found.unknown.setdefault(what, []).append(entry.name)
        except PhatgooseError as error:
            found.problems[f"{group}: {entry.name}" if group else entry.name] = str(error)


def _bigbench(spec: TaskSpec, folder: Path | None, found: Checked) -> list[str]:
    if not bigbench_files.at_hand(folder):
        return ["BIG-bench, which isn't in the cache"]
    bigbench_files.find(bigbench_files.root(folder), spec.name)
    return []


def _bbh(spec: TaskSpec, folder: Path | None, found: Checked) -> list[str]:
    bbh.check_name(spec, folder)
    return [] if bbh.at_hand(folder) else ["the Hub"]


def _prompted(spec: TaskSpec, folder: Path | None, found: Checked) -> list[str]:
    spec.check_options(prompted.OPTIONS)
    unsure = [] if check_splits(spec.text) else ["splits that only the Hub knows"]
    if folder is None:
        unsure.append("the Hub")
    else:
        prompted.files(spec, folder)
    if not templates.at_hand():
        return [*unsure, "promptsource's prompts, which aren't in the cache"]
    found.prompts[spec.name] = len(prompted.choose(spec))
    return unsure


def _file(spec: TaskSpec, folder: Path | None, found: Checked) -> list[str]:
    path = (folder or Path()) / Path(spec.name).expanduser()
    if path.exists():
        return []
    if is_local(spec.text):
        raise PhatgooseError(f"{path} does not exist.")
    return ["the Hub"]


def _elsewhere(spec: TaskSpec, folder: Path | None, found: Checked) -> list[str]:
    return ["the Hub"] if folder is None else [f"what {folder} holds"]


_LOOK: dict[str, Callable[[TaskSpec, Path | None, Checked], list[str]]] = {
    "bigbench": _bigbench,
    "bbh": _bbh,
    "prompted": _prompted,
    "jsonl": _file,
    "hf": _file,
    "p3": _elsewhere,
    "flan": _elsewhere,
}
