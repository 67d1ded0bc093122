"""What a process keeps between the steps of an experiment: base, tasks, pool, scores."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from phatgoose.errors import PhatgooseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.names import MANIFEST, RECORD_FILE
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256_json
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.load import load_base
from phatgoose.records import Task
from phatgoose.routers import Router, Single
from phatgoose.routers.example import AUTO, ByText
from phatgoose.tasks.lists.entries import Entry, load_entry, with_validation
from phatgoose.tasks.lists.named import Suite
from phatgoose.tasks.splits import Fractions, normalise
from phatgoose.training.gate import match_to_base
from phatgoose.workflows.experiment.recipe import IN_POOL, ExperimentRecipe, without_own_copies
from phatgoose.workflows.experiment.scores import ScoreCache
from phatgoose.workflows.experiment.systems import MULTITASK, build

UNSEEN_FRACTIONS = Fractions(test=0.7, validation=0.3)
"""Nothing is trained on a suite's tasks, so one without splits of its own is divided into test and validation rows."""

KEPT_ROWS = 1_000_000
"""The most training rows that a process keeps in memory, of a kilobyte or two each; the oldest tasks are dropped."""


class WorkerState:
    """One process's view of an experiment; everything is loaded when it is first needed."""

    def __init__(self, recipe: ExperimentRecipe, out: Path):
        self.recipe, self.out = recipe, out
        self.suites = {IN_POOL: Suite(IN_POOL, recipe.pool_entries)}
        self.suites |= {s.name: without_own_copies(recipe, s)[0] for s in recipe.suites}
        self._tasks: dict[tuple[str, str, bool], Task] = {}
        self._systems: dict[Any, tuple[Pool | None, Router | None]] = {}
        self._other: tuple[str, ScoreCache] | None = None
        self._pool_key = ""
        self._own: dict[tuple[str, str], Expert] = {}
        self._own_pool: Pool | None = None

    @cached_property
    def base(self) -> Base:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        return load_base(self.recipe.base, dtype=self.recipe.dtype, device=device)

    @cached_property
    def scores(self) -> ScoreCache:
        return ScoreCache(self.base, self.out / "scores", self.options)

    @property
    def options(self) -> RouteOptions:
        return RouteOptions(self.recipe.measure.backend)

    @cached_property
    def pool(self) -> Pool:
        return Pool.load(self.out / "pool")

    def use_pool(self, key: str) -> None:
        """Reads the pool again unless `key` names the content that was read."""
        if key != self._pool_key:
            self._pool_key = key
            self._systems.clear()
            self.__dict__.pop("pool", None)

    def other(self, spec: str) -> ScoreCache:
        """The scores of another model by itself; the last such model is kept."""
        if self._other is None or self._other[0] != spec:
            self._other = None  # frees it first: two may not fit
            base = load_base(spec, dtype=self.recipe.dtype, device=str(self.base.device))
            self._other = spec, ScoreCache(base, self.out / "scores")
        return self._other[1]

    def entry(self, suite: str, name: str) -> Entry:
        return next(e for e in self.suites[suite].entries if e.name == name)

    def task(self, suite: str, name: str, *, trained_on: bool = False) -> Task:
        """A task of a suite with the rows that are measured; a task of "in-pool" with its training rows too.

        Args:
            trained_on: as a task of "in-pool", with the rows that an expert of its own was trained and validated on.
                Where the data has no validation split, these aren't the suite's: nothing is trained on a suite's
                tasks otherwise, so more of the training split goes to validation.
        """
        key = suite, name, trained_on
        if key not in self._tasks:
            entry = self.entry(suite, name)
            if suite == IN_POOL or trained_on:
                group, rows = (
                    self.recipe.group_of(name) if suite == IN_POOL else suite,
                    self.recipe.pool.train_rows,
                )
                loaded = load_entry(entry, group=group, folders=self.recipe.folders, limit={"train": rows})
            else:
                loaded = self._unseen(suite, entry)
            self._tasks[key] = loaded
            # Dicts keep their order, so the oldest task goes first; the one that was just loaded stays.
            while len(self._tasks) > 1 and sum(len(t.train) for t in self._tasks.values()) > KEPT_ROWS:
                del self._tasks[next(k for k in self._tasks if k != key)]
            return loaded
        return self._tasks[key]

    def own_expert(self, suite: str, name: str) -> Expert:
        """The expert in `own_experts` of a suite's task, which was trained on the rows of `task(trained_on=True)`.

        Raises:
            PhatgooseError: there is none, or it saw other rows, another base, or rows that the suite measures.
        """
        if (suite, name) in self._own:
            return self._own[suite, name]
        task, place = self.task(suite, name, trained_on=True), Path(self.recipe.measure.own_experts)
        there = self._own_experts_named(place, name)
        if not there:
            raise PhatgooseError(f"{place} has no expert named {name}, by which it would be measured.")
        found = [e for e in there if _trained_rows(e) == task.hash]
        if len(found) != 1:
            raise PhatgooseError(
                f"{len(there)} experts of {place} are named {name}, and {len(found)} of them were trained on the rows "
                f"that this recipe would train it on ([pool] train_rows = {self.recipe.pool.train_rows}); expected one."
            )
        measured = {
            normalise(e.placed_by) for e in self.task(suite, name).test[: self.recipe.measure.test_rows]
        }
        seen = [
            split
            for split in (task.train, task.validation)
            if measured & {normalise(e.placed_by) for e in split}
        ]
        if seen:
            raise PhatgooseError(
                f"{name}: rows that are measured are also training or validation rows of its own expert: give its "
                "entry `fractions`, so that both split its data alike."
            )
        match_to_base(self.base, found[0])
        return self._own.setdefault((suite, name), found[0])

    def _own_experts_named(self, place: Path, name: str) -> list[Expert]:
        if (place / MANIFEST).exists():
            self._own_pool = self._own_pool or Pool.load(place)
            return [e for e in self._own_pool.experts if e.name == name]
        folders = (p.parent for p in sorted(place.glob(f"{glob.escape(name)}-*/{RECORD_FILE}")))
        return [e for e in map(Expert.load, folders) if e.name == name]

    def _unseen(self, suite: str, entry: Entry) -> Task:
        measure = self.recipe.measure
        most = measure.test_rows + measure.choice_rows
        task = load_entry(
            entry, group=suite, folders=self.recipe.folders, fractions=UNSEEN_FRACTIONS, needed=most,
            limit={"train": 0, "validation": measure.choice_rows},
        )  # fmt: skip
        # Needs all test rows: a raw row that isn't measured may be far behind those that are.
        task = with_validation(task, measure.test_rows, measure.choice_rows)
        return replace(task, test=task.test[:most], validation=task.validation[: measure.choice_rows])

    def system(self, name: str, expert: str | None) -> tuple[Pool | None, Router | None]:
        """(pool, router) to attach. `expert`: the one that was chosen, or the hash of this run's multitask expert."""
        if name == MULTITASK:
            found = Expert.load(self.multitask_folder(self.pool.names))
            if found.hash != expert:
                raise PhatgooseError(f"the multitask expert in its folder isn't this run's, {expert}.")
            return Pool([found]), Single(0)
        if (name, expert) not in self._systems:
            # A merged pool is as large as a pool, so only a few are kept.
            if len(self._systems) > 4:
                self._systems.clear()
            pool, router = build(name, self.pool, expert) if name != "base" else (None, None)
            if isinstance(router, ByText) and router.encoder == AUTO:
                router = replace(router, encoder=self.recipe.signature.encoder)
            self._systems[name, expert] = pool, router
        return self._systems[name, expert]

    def expert_folder(self, entry: Entry) -> Path:
        """Where an expert is trained. Its settings are in the name: another recipe's expert is never overwritten."""
        recipe = self.recipe
        trained = [recipe.expert.key(), recipe.gate.key(), _rows_of(entry)]
        asked = [recipe.base, recipe.dtype, *trained, recipe.pool.train_rows]
        return self.out / "experts" / f"{entry.name}-{sha256_json(asked)[:10]}"

    def multitask_folder(self, names: Sequence[str]) -> Path:
        """Where the one expert on the data of all these experts is trained."""
        recipe = self.recipe
        specs = {e.name: _rows_of(e) for e in recipe.pool_entries}
        asked = [recipe.base, recipe.dtype, (recipe.multitask or recipe.expert).key(), recipe.pool.train_rows]
        return self.out / "experts" / f"multitask-{sha256_json([*asked, [specs[n] for n in names]])[:10]}"


def _trained_rows(expert: Expert) -> str | None:
    """The hash of the task that an expert's record says it was trained on."""
    task = expert.provenance.get("task")
    return task.get("hash") if isinstance(task, Mapping) else None


def _rows_of(entry: Entry) -> list[Any]:
    """What decides which rows an entry has."""
    more = [entry.fractions, entry.apart_from] if entry.fractions or entry.apart_from else []
    return [*entry.specs, *more]


Run = Mapping[str, Any]
"""The run that a step is part of: its "recipe" as JSON, its folder "out", and a "number" of its own."""


@lru_cache(maxsize=1)
def _cached_state(run: str) -> WorkerState:
    """The state for this run. It is kept for the next step, but not for another run."""
    transformers_logging.disable_progress_bar()
    known = json.loads(run)
    return WorkerState(ExperimentRecipe.from_json(known["recipe"]), Path(known["out"]))


def worker_state(run: Run, pool: str = "") -> WorkerState:
    """This process's state for a run. `pool`: the name of its content, for a step that reads it."""
    state = _cached_state(json.dumps(run))  # unsorted: tasks keep their order
    if pool:
        state.use_pool(pool)
    return state
