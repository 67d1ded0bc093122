"""Check a recipe's names, splits, prompts and files before anything is loaded or fetched."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from phatgoose.errors import PhatgooseError
from phatgoose.experts.manifest import read_manifest
from phatgoose.tasks.lists.entries import Entry, folder_for
from phatgoose.tasks.load import check_task
from phatgoose.tasks.sources import prompted, promptsource
from phatgoose.tasks.spec import split_spec
from phatgoose.workflows.experiment.recipe import IN_POOL, ExperimentRecipe, RecipeError, without_own_copies
from phatgoose.workflows.experiment.systems import MULTITASK


@dataclass
class Checked:
    """What the check found."""

    problems: dict[str, str] = field(default_factory=dict)
    """Task → why a run can't load it."""
    prompts: dict[str, int] = field(default_factory=dict)
    """Spec → how many prompts its rows are shown under."""
    unknown: dict[str, list[str]] = field(default_factory=dict)
    """What couldn't be checked → the tasks that need it."""


def check_data(recipe: ExperimentRecipe) -> Checked:
    """Checks every task of the pool and the suites against the files on this machine; fetches nothing, reads no row."""
    found = Checked()
    try:
        recipe.check_own_experts()
    except RecipeError as error:
        found.problems["own experts"] = str(error)
    for suite in recipe.suites:
        kept, missing = without_own_copies(recipe, suite)
        for name in missing:
            found.unknown.setdefault("your own copies, without which they are left out", []).append(name)
        if suite.name != IN_POOL:
            for entry in kept.entries:
                _check(found, recipe, entry, suite.name)
    spared = _only_searched(recipe)
    for entry in recipe.pool_entries:
        _check(found, recipe, entry, recipe.group_of(entry.name), spared=entry.name in spared)
    return found


def _only_searched(recipe: ExperimentRecipe) -> set[str]:
    """Existing experts whose rows no step needs: missing ones are merely not searched for contamination."""
    used = IN_POOL in recipe.measure.suites or recipe.needs_signatures or MULTITASK in recipe.all_systems
    if used or not recipe.pool.folder:
        return set()
    return {expert["name"] for expert in read_manifest(Path(recipe.pool.folder))["experts"]}


def _check(
    found: Checked, recipe: ExperimentRecipe, entry: Entry, group: str, *, spared: bool = False
) -> None:
    for spec in entry.specs:
        folder = folder_for(spec, (entry.name, group), recipe.folders)
        try:
            unsure = check_task(spec, folder)
        except PhatgooseError as error:
            if not spared:
                found.problems[f"{group}: {entry.name}" if group else entry.name] = str(error)
                continue
            unsure = "rows of existing experts, which aren't searched for contamination then"
        if unsure is not None:
            found.unknown.setdefault(unsure, []).append(entry.name)
        parsed = split_spec(spec)
        if parsed.source == "prompted" and promptsource.is_available():
            found.prompts[spec] = len(prompted.choose_templates(parsed))
