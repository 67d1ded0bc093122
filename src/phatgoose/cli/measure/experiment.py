"""`phatgoose experiment`: run a recipe, or check it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import AT_LEAST_0, POOL_HELP
from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError, TaskError
from phatgoose.shipped import recipes

PROBLEMS = 12
"""How many problems a check prints in full."""

if TYPE_CHECKING:
    from phatgoose.workflows.experiment.executors import Executor
    from phatgoose.workflows.experiment.recipe import ExperimentRecipe


@dataclass(frozen=True)
class DataOptions(Options):
    """Where a recipe's data and experts are."""

    folder: list[str] | None = None
    """NAME=FOLDER: read a task's, a suite's, a pool's or a source's data from there (story_cloze=…, t0ho=…, bbh=…)."""
    pool: Annotated[
        Path | None,
        typer.Option(
            help=f"{POOL_HELP} Its experts are taken, not trained. Only the recipe's other tasks are trained on."
        ),
    ] = None
    own_experts: Path | None = None
    """Experts on the training rows of unseen tasks, by which [measure] admit_rows admits these: a pool, or the folder
    `experts` of an experiment."""


@dataclass(frozen=True)
class ExecutorOptions(Options):
    """What runs the steps."""

    workers: Annotated[int | None, AT_LEAST_0] = None
    """Processes on this machine, 1 if not given; 0: everything in this one."""
    ray: str | None = None
    """Run on Ray: `local`, or the address of a cluster (auto, ray://host:10001)."""
    cpus: Annotated[float | None, AT_LEAST_0] = None
    """With --ray: CPUs that a step asks for; 1 if not given."""
    gpus: Annotated[float, AT_LEAST_0] = 0
    """GPUs that a step asks for (with --ray, parts of one too); else how many to share."""
    retries: Annotated[int, AT_LEAST_0] = 1
    """How often a step is run again whose worker died."""

    def executor(self) -> Executor:
        """What these options ask for."""
        from phatgoose.workflows.experiment.executors import Executor, Processes

        on_ray, cpus, gpus = self.ray is not None, self.cpus, self.gpus
        refusals = (
            (not math.isfinite(cpus or 0), f"--cpus {cpus}: expected a number that is finite."),
            (not math.isfinite(gpus), f"--gpus {gpus}: expected a number that is finite."),
            (cpus == 0, "--cpus 0: all steps would start at once; expected more than 0."),
            (
                on_ray and self.workers is not None,
                "--workers: with --ray, as many steps run as its CPUs and GPUs allow (--cpus).",
            ),
            (
                not on_ray and cpus is not None,
                "--cpus: only with --ray does a step ask for CPUs; elsewhere they are shared out (--workers).",
            ),
            (not on_ray and gpus % 1, f"--gpus {gpus}: only with --ray can a step ask for a part of a GPU."),
            (
                self.workers == 0 and gpus,
                f"--gpus {gpus:g}: GPUs are dealt out to workers, and --workers is 0.",
            ),
        )
        for wrong, why in refusals:
            if wrong:
                raise PhatgooseError(why)
        if on_ray:
            from phatgoose.workflows.experiment.ray_executor import RayExecutor

            address = None if self.ray == "local" else self.ray
            return RayExecutor(address, cpus=1 if cpus is None else cpus, gpus=gpus, retries=self.retries)
        if self.workers == 0:
            return Executor(self.retries)
        return Processes(self.workers or 1, gpus=int(gpus), retries=self.retries)


@dataclass(frozen=True)
class RunOptions(Options):
    """What of the recipe is done, and where."""

    out: Path | None = None
    """The folder for everything; RECIPE's name with -out if not given."""
    check: bool = False
    """Only check the recipe, and as far as files on this machine tell, that names, splits, prompts and data exist;
    nothing is loaded or fetched."""
    fresh: bool = False
    """Start over instead of continuing with what is in the folder."""


@expand_options
def command(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A TOML file (base, pool, systems, suites, settings), or the name of one that comes with phatgoose: "
            f"{', '.join(recipes())}."
        ),
    ],
    data: DataOptions,
    steps: ExecutorOptions,
    run: RunOptions,
) -> None:
    """Train a pool's experts and gates, measure every router and baseline on the same rows, and compare them.

    Writes results.json, results.md, plot.svg and a page. If it is stopped or killed, the same command continues
    where it was. A step that fails costs only itself; the exit code is then 1, and the same command runs it again.
    """
    from phatgoose.workflows.experiment.recipe import ExperimentRecipe
    from phatgoose.workflows.experiment.run import run_experiment

    found = ExperimentRecipe.read(recipe, _folders(data.folder or []), data.pool, data.own_experts)
    if run.check:
        _show_recipe(found)
        _show_data(found)
        return
    target = run.out or Path(f"{recipe.stem}-out")
    for what, taken in (("pool", found.pool.folder), ("own experts", found.measure.own_experts)):
        if run.fresh and taken and Path(taken).resolve().is_relative_to(target.resolve()):
            raise PhatgooseError(
                f"--fresh would remove the {what} to be taken, {taken}: choose another --out."
            )
    executor = steps.executor()
    try:
        results = run_experiment(found, target, executor=executor, fresh=run.fresh)
    finally:
        executor.close()
    _show_results(results, target)


def _show_results(results: Mapping[str, Any], target: Path) -> None:
    """Prints every suite's table and what failed; exits with 1 if anything did."""
    for name, suite in results["suites"].items():
        measured = [(system, v) for system, v in suite["systems"].items() if "mean" in v]
        ranked = sorted(measured, key=lambda item: -item[1]["mean"])
        show.say(f"{name}, mean of {len(suite['common_tasks'])} tasks")
        rows = [(s, f"{v['mean']:.3f}", f"{v['low']:.3f} to {v['high']:.3f}") for s, v in ranked]
        show.table(("system", "mean", "95 %"), rows)
        show.say()
    written = ("results.json", "results.md", "plot.svg", "experiment.html")
    show.note(f"written: {', '.join(str(target / file) for file in written)}")
    for what, why in results["failed"].items():
        show.warn(f"{what}: {why}")
    if results["failed"]:
        raise typer.Exit(1)


def _folders(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise TaskError(f"--folder {text!r} should read NAME=FOLDER.")
        found[name] = path
    return found


def _show_recipe(recipe: ExperimentRecipe) -> None:
    """Prints what a recipe comes to."""
    show.facts(
        [
            ("base", recipe.base),
            ("experts", _experts(recipe)),
            ("systems", ", ".join(recipe.all_systems)),
            *((f"suite {s.name}", f"{len(s.entries)} tasks") for s in recipe.suites),
        ]
    )


def _show_data(recipe: ExperimentRecipe) -> None:
    """Prints what is known of its data; exits with 1 if some can't be loaded."""
    from phatgoose.workflows.experiment.check import check_data

    found = check_data(recipe)
    if found.prompts:
        show.facts([("prompts", f"{sum(found.prompts.values())} of {len(found.prompts)} datasets")])
    for what, tasks in found.unknown.items():
        names = list(dict.fromkeys(tasks))
        some = f"{', '.join(names[:4])} and {len(names) - 4} more" if len(names) > 5 else ", ".join(names)
        show.note(f"not checked: {what} ({some})")
    for task, why in list(found.problems.items())[:PROBLEMS]:
        show.warn(f"{task}: {why}")
    if (more := len(found.problems) - PROBLEMS) > 0:
        show.warn(f"and {more} more tasks that can't be loaded.")
    if found.problems:
        raise typer.Exit(1)


def _experts(recipe: ExperimentRecipe) -> str:
    """How many experts are trained, and how many are taken."""
    from phatgoose.experts.manifest import read_manifest

    tasks = [e.name for e in recipe.pool_entries]
    if not recipe.pool.folder:
        return str(len(tasks))
    there = [expert["name"] for expert in read_manifest(Path(recipe.pool.folder))["experts"]]
    taken = recipe.taken(there)
    return f"{len({*tasks, *taken})}: {len(taken)} of {recipe.pool.folder}, {len(set(tasks) - set(taken))} to train"
