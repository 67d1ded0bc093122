"""The main job, end to end: contributors train experts and gates, the pool routes every token, a table says how good it is.

Everything lies under one folder and is found again by a second run: experts/ (one finished folder each), pool/, scores/,
results.json, quickstart.html. work/ holds what an interrupted training needs to go on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from phatgoose.analysis.page import report
from phatgoose.experts.expert import Expert
from phatgoose.experts.merge import merged
from phatgoose.experts.names import slug
from phatgoose.experts.pool import Pool
from phatgoose.files import write_json
from phatgoose.models.base.base import Base
from phatgoose.models.base.load import load_base
from phatgoose.records import Task, TaskScore
from phatgoose.routers import PHATGOOSE, Random, Router, Single, Uniform
from phatgoose.tasks import Fractions, load_task
from phatgoose.workflows import show, summary
from phatgoose.workflows.contribute import contribute, record
from phatgoose.workflows.experiment.oracle import best, standing
from phatgoose.workflows.experiment.scores import Measurements
from phatgoose.workflows.recipe import Recipe
from phatgoose.workflows.recipes import QUICKSTART, SMOKE
from phatgoose.workflows.run_folder import forget, held
from phatgoose.workflows.traced import traced, with_cards

BASELINES = ("base", "random", "uniform", "merged")


@dataclass(frozen=True)
class System:
    """A row of the table: how the base is used."""

    name: str
    kind: str
    note: str
    pool: Pool | None
    router: Router | None


def run_quickstart(
    out: str | Path = "quickstart-out",
    *,
    smoke: bool = False,
    fresh: bool = False,
    recipe: Recipe | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the quickstart, or what is left of it, and returns what results.json holds.

    Args:
        out: the folder for everything.
        smoke: two experts and a few steps, to see that all parts work; the numbers mean nothing.
        fresh: forget what is in `out` (only if it is a quickstart's folder).
        recipe: another recipe than the built-in one.

    Raises:
        PhatgooseError: with what to do; run again to go on where it stopped.
    """
    out, console = Path(out), console or show.screen()
    recipe = recipe or (SMOKE if smoke else QUICKSTART)
    with held(out, "quickstart"):
        if fresh:
            forget(out)
        return _quickstart(out, recipe, console)


def _quickstart(out: Path, recipe: Recipe, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    show.plan(console, recipe, out)
    base = load_base(recipe.base, dtype=_dtype())
    tasks = _tasks(recipe)
    show.base(console, base, tasks)
    run = _Run(recipe, out, console, base, tasks)
    run.measure(System("base", "base", "the base model alone", None, None))
    experts = [run.contribute(task) for task in tasks["in-pool"]]
    pool = Pool(experts)
    pool.save(out / "pool")
    for system in run.systems(pool):
        run.measure(system)
    run.add_oracle(pool)
    results = run.results(pool, seconds=time.monotonic() - started)
    every = [task for members in tasks.values() for task in members]
    seen = traced(base, pool, PHATGOOSE(recipe.top_k), every, shown=recipe.shown_prompts)
    results |= {"shares": seen.shares, "layers": seen.layers}
    results["experts"] = with_cards(results["experts"], seen.cards)
    write_json(out / "results.json", results)
    page = report(results, seen.prompts, out=out / "quickstart.html")
    show.table(console, results)
    show.verdict(console, results)
    show.next_steps(console, out, recipe, page, pool)
    return results


class _Run:
    """What the steps share."""

    def __init__(self, recipe: Recipe, out: Path, console: Console, base: Base, tasks: dict[str, list[Task]]):
        self.recipe, self.out, self.console, self.base, self.tasks = recipe, out, console, base, tasks
        self.every = [*tasks["in-pool"], *tasks["held-out"]]
        self.measurements = Measurements(base, out / "scores")
        self.table: dict[str, dict[str, TaskScore]] = {}
        self.kinds: dict[str, tuple[str, str]] = {}
        self.experts: list[dict[str, Any]] = []

    def measure(self, system: System) -> None:
        """All test rows of all tasks; the scores go into the table."""
        with show.progress(self.console, f"measuring {system.name}", len(self.every)) as step:
            row = {}
            for task in self.every:
                row[task.name] = self.measurements.score(
                    task, system.pool, system.router, limit=self.recipe.test_rows, progress=step.inner
                )
                step.advance()
        self.table[system.name] = row
        self.kinds[system.name] = (system.kind, system.note)
        show.system(self.console, system.name, row, {g: [t.name for t in ts] for g, ts in self.tasks.items()})

    def contribute(self, task: Task) -> Expert:
        """What one contributor does: trains an expert on their own task, then its gates; shows what the expert gained."""
        name = slug(show.short(task.name))
        expert = contribute(
            self.base,
            task,
            self.recipe.expert,
            self.recipe.gate,
            name=name,
            folder=self.out / "experts" / name,
            work=self.out / "work" / name,
        )
        own = self.measurements.score(
            task, Pool([expert]), Single(0), limit=self.recipe.test_rows, progress=False
        )
        scores = {"base": self.table["base"][task.name].mean, "own": own.mean}
        self.experts.append({**record(expert, task), **scores})
        show.expert(self.console, self.experts[-1])
        return expert

    def systems(self, pool: Pool) -> list[System]:
        average = Pool([merged(pool)])
        return [
            *(
                System(f"single: {e.name}", "single", "this expert on every token", Pool([e]), Single(0))
                for e in pool.experts
            ),
            System("merged", "static", "one expert: the average of all updates", average, Single(0)),
            System(
                "uniform",
                "control",
                "all experts on every token, equal weights: the same function as merged",
                pool,
                Uniform(),
            ),
            System(
                "random",
                "control",
                "random experts for every token and module",
                pool,
                Random(self.recipe.seed, self.recipe.top_k),
            ),
            System(
                "PHATGOOSE",
                "router",
                "experts chosen by their gates for every token and module",
                pool,
                PHATGOOSE(self.recipe.top_k),
            ),
        ]

    def add_oracle(self, pool: Pool) -> None:
        """Per task the single expert that is best on validation rows (see `oracle`): needs labels and a task's name."""
        row = {}
        with show.progress(
            self.console, "choosing the oracle's experts", len(self.every) * len(pool)
        ) as step:
            for task in self.every:
                found = {}
                for expert in pool.experts:
                    score = self.measurements.score(
                        task,
                        Pool([expert]),
                        Single(0),
                        split="validation",
                        limit=self.recipe.choice_rows,
                        progress=False,
                    )
                    step.advance()
                    found[expert.name] = [standing(score, task.validation[: self.recipe.choice_rows])]
                row[task.name] = self.table[f"single: {best(found)}"][task.name]
                self.kinds.setdefault(
                    "oracle", ("oracle", "per task, the single expert that is best on its validation rows")
                )
        self.table["oracle"] = row

    def results(self, pool: Pool, seconds: float) -> dict[str, Any]:
        groups = {group: [t.name for t in tasks] for group, tasks in self.tasks.items()}
        systems = []
        for name, row in self.table.items():
            kind, note = self.kinds[name]
            scores = {
                t: {"mean": s.mean, "low": s.low, "high": s.high, "rows": s.rows} for t, s in row.items()
            }
            systems.append(
                {
                    "name": name,
                    "kind": kind,
                    "note": note,
                    "scores": scores,
                    "groups": summary.group_means(row, groups),
                }
            )
        first = self.table["base"]
        return {
            "format": "phatgoose-quickstart",
            "version": 1,
            "title": "phatgoose quickstart",
            "made": show.made(seconds),
            "base": {"spec": self.base.spec, "notes": list(self.base.notes), "dtype": str(self.base.model.dtype), "fingerprint": self.base.fingerprint.to_json()},
            "recipe": self.recipe.to_json(),
            "experts": self.experts,
            "tasks": [
                {"name": t.name, "spec": t.source.get("spec", t.name), "hash": t.hash, "group": group,
                 "metric": first[t.name].metric, "rows": first[t.name].rows}
                for group, tasks in self.tasks.items() for t in tasks
            ],
            "systems": systems,
            "comparisons": summary.comparisons(self.table, groups, "PHATGOOSE", [*BASELINES, "oracle"]),
            "recovered": {group: summary.recovered(self.table, names, "PHATGOOSE") for group, names in groups.items() if names},
            "pool": {e.name: e.hash for e in pool.experts},
            "notes": show.NOTES,
        }  # fmt: skip


def _dtype() -> str:
    """bfloat16 where the hardware computes in it (three times as fast there), else float32; recorded with the results."""
    fast = (
        torch.cuda.is_available()
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    return "bfloat16" if fast else "float32"


def _tasks(recipe: Recipe) -> dict[str, list[Task]]:
    trained = [load_task(spec, limit={"train": recipe.train_rows}) for spec in recipe.pool_tasks]
    share = recipe.held_out_test_share
    unseen = Fractions(test=share, validation=1 - share)
    return dict(
        zip(
            summary.GROUPS,
            (trained, [load_task(s, fractions=unseen) for s in recipe.held_out_tasks]),
            strict=True,
        )
    )
