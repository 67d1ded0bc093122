"""An experiment from its recipe: train, choose, measure, compare, and report.

Everything lies in one folder: recipe.json, experts/, pool/, scores/, results.json, results.md, plot.svg, a page,
and work/, which holds what an interrupted training needs. A second run finds every finished step again. Steps run
through an executor; this driver itself loads no base.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from phatgoose.analysis.page import RoutedPrompt, report
from phatgoose.errors import StorageError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256_json, storage_errors, write_bytes, write_json
from phatgoose.locks import only_run
from phatgoose.tasks.contamination import RUN_WORDS
from phatgoose.tasks.lists.entries import SAME_DATASET, Entry, check_no_shared_data
from phatgoose.workflows.experiment.admission import SISTERS, verdict
from phatgoose.workflows.experiment.board import Board
from phatgoose.workflows.experiment.documents import markdown, plot
from phatgoose.workflows.experiment.executors import Executor, Step
from phatgoose.workflows.experiment.page import page_data
from phatgoose.workflows.experiment.recipe import IN_POOL, ExperimentRecipe, RecipeError, without_own_copies
from phatgoose.workflows.experiment.results import Findings, results_of
from phatgoose.workflows.experiment.systems import CHOSEN, MULTITASK, ORACLE, OWN, SISTER, TOLD, picks
from phatgoose.workflows.page import with_cards

_STEPS = "phatgoose.workflows.experiment.steps"


def run_experiment(
    recipe: ExperimentRecipe,
    out: str | Path,
    *,
    executor: Executor | None = None,
    console: Console | None = None,
    fresh: bool = False,
    kind: str = "experiment",
) -> dict[str, Any]:
    """Runs the recipe, or the steps that are still missing, and returns what results.json holds.

    A failed step doesn't stop the others. An expert that can't be trained is left out of the pool, a task that some
    system can't be measured on is left out of the comparison, and so is a system that fails everywhere.
    results["failed"] says which and why.

    Args:
        out: the folder for everything. With several machines, all of them must see it under this name.
        executor: what runs the steps; None: this process, one after the other.
        fresh: remove what an earlier run made in `out`, if it is such a run's folder.
        kind: what the folder is marked as, and the name of its page: "experiment" or "quickstart".

    Raises:
        StorageError: `out` is a folder of something else, or another run is at work there. RecipeError: no expert
            could be taken or trained, or as `ExperimentRecipe.check_own_experts`. TaskError: an expert that is taken
            was trained on what a suite measures.
    """
    out = Path(out)
    recipe.check_own_experts()
    with locked_folder(out, kind):
        if fresh:
            clear(out)
        run = _Run(recipe, out, executor or Executor(), console or Console(stderr=True))
        with run.board:
            results = run.all()
        write_json(out / "results.json", results)
        write_bytes(out / "results.md", markdown(results).encode())
        write_bytes(out / "plot.svg", plot(results).encode())
        data = page_data(results)
        if data["tasks"] and data["systems"]:
            report(data, run.prompts, out=out / f"{kind}.html")
        return results


@contextlib.contextmanager
def locked_folder(out: Path, kind: str) -> Iterator[None]:
    """Marks `out` as the folder of a `kind` of run ("quickstart", "experiment") and locks it.

    Raises:
        StorageError: it is a folder of something else, or another run is at work in it.
    """
    marker = out / f".phatgoose-{kind}"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.exists())):
        raise StorageError(
            f"{out} exists and is not {'an' if kind[0] in 'aeiou' else 'a'} {kind}'s folder; choose another one "
            "with --out."
        )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    with only_run(out, out / ".run.lock"):
        yield


def clear(out: Path) -> None:
    """Removes what an earlier run made; call it only while the folder is locked."""
    for name in ("experts", "pool", "scores", "work"):
        shutil.rmtree(out / name, ignore_errors=True)


class _Run:
    """A run under way. Every stage adds what it learns to `found`."""

    def __init__(self, recipe: ExperimentRecipe, out: Path, executor: Executor, console: Console):
        self.recipe, self.out, self.executor = recipe, out, executor
        self.board = Board(console)
        self.found = Findings()
        self.prompts: list[RoutedPrompt] = []
        # The number makes processes that worked for an earlier run read their data again.
        self.common = {
            "run": {"recipe": recipe.to_json(), "out": str(out.absolute()), "number": secrets.token_hex(8)}
        }

    def all(self) -> dict[str, Any]:
        started = time.monotonic()
        write_json(self.out / "recipe.json", self.recipe.to_json())
        taken, refused = self.take()
        self.check()
        records = self.admit(self.train(taken, refused), taken)
        self.sign(records)
        pool = self.gather(records)
        # Steps name the pool by its content: a worker that loaded another one reads it again.
        signatures = [e.signature.hash for e in pool.experts if e.signature is not None]
        key = sha256_json([*(e.hash for e in pool.experts), *signatures])
        self.admit_tasks(key)
        self.leave_out(pool)
        self.choose(pool, key)
        self.measure(key)
        self.contaminated(pool)
        self.found.experts = [records[n] for n in pool.names]
        self.trace(key)
        return results_of(self.recipe, self.out, self.found, time.monotonic() - started)

    def stage(self, name: str, steps: Mapping[Any, Step]) -> dict[Any, Any]:
        """Runs steps, given under keys of any kind: the values of those that succeed, under the same keys."""
        asked = list(steps.values())
        outcomes = self.executor.run(asked, self.board.stage(name, asked)) if asked else {}
        self.found.failed |= {what: o.error for what, o in outcomes.items() if o.error is not None}
        return {key: outcomes[step.name].value for key, step in steps.items() if outcomes[step.name].ok}

    def step(self, label: str, function: str, **arguments: Any) -> Step:
        return Step(label, f"{_STEPS}:{function}", self.common | arguments)

    def take(self) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """(records of the experts taken from an existing pool, names of those that can't be taken)."""
        if not self.recipe.pool.folder:
            return {}, set()
        label = "take the pool's experts"
        found = self.stage("take", {"all": self.step(label, "take")})
        if not found:
            raise RecipeError(self.found.failed[label])
        taken, failed = found["all"]["taken"], found["all"]["failed"]
        self.found.failed |= {f"take {name}": why for name, why in failed.items()}
        said = [Entry(name, tuple(r["trained_on"])) for name, r in taken.items() if r["trained_on"]]
        for one in self.recipe.suites:
            if one.name != IN_POOL:
                check_no_shared_data(said, one.entries, one.refuses, one.name, self.recipe.folders)
        return taken, set(failed)

    def check(self) -> None:
        """Finds out what is known of every task, and which tasks can't be measured."""
        steps = {
            s.name: self.step(f"check {s.name}", "check_tasks", suite=s.name) for s in self.recipe.suites
        }
        known = self.stage("check", steps)
        for one in self.recipe.suites:
            tasks = self.found.tasks[one.name] = {}
            left_out = self.found.left_out[one.name] = {
                name: f"needs your own copy of its data: give its folder (--folder {name}=FOLDER)"
                for name in without_own_copies(self.recipe, one)[1]
            }
            for name, info in known.get(one.name, {}).items():
                if "error" in info:
                    self.found.failed[f"{one.name}: {name}"] = left_out[name] = info["error"]
                elif info["lost"]["left_out"] and one.name != IN_POOL:
                    share = max(info["lost"]["answers"], info["lost"]["prompt"])
                    left_out[name] = (
                        f"the base's tokenizer can't write it ({share:.0%} of its answers or prompts are lost)"
                    )
                else:
                    if answers := info.pop("answers", None):
                        self.found.answers.setdefault(one.name, {})[name] = answers
                    tasks[name] = info

    def train(self, taken: Mapping[str, dict[str, Any]], refused: set[str]) -> dict[str, dict[str, Any]]:
        """The records of all experts: those of the recipe's tasks in order, then the others that are taken."""
        unloaded = self.found.left_out.get(IN_POOL, {})
        names = [e.name for e in self.recipe.pool_entries if e.name not in unloaded or e.name in taken]
        untaken = [n for n in names if n not in taken and n not in refused]
        trained = self.stage("train", {n: self.step(f"train {n}", "train", name=n) for n in untaken})
        records = {**taken, **trained}
        return {n: records[n] for n in dict.fromkeys((*names, *taken)) if n in records}

    def admit(
        self, records: dict[str, dict[str, Any]], taken: Mapping[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The records without those of trained experts that don't gain over the base, if the recipe asks for that."""
        asked = [n for n in records if n not in taken] if self.recipe.pool.admit_rows else []
        steps = {n: self.step(f"admit {n}", "admit", name=n, folder=records[n]["folder"]) for n in asked}
        self.found.admission = self.stage("admit", steps)
        out = {n for n in asked if n not in self.found.admission or self.found.admission[n]["low"] <= 0}
        return {name: record for name, record in records.items() if name not in out}

    def admit_tasks(self, key: str) -> None:
        """Finds out which tasks with sisters count, if the recipe asks for that; `leave_out` drops the others."""
        measure = self.recipe.measure
        if not measure.admit_rows:
            return
        asked = [
            (suite, name)
            for suite, tasks in self.found.tasks.items()
            for name, info in tasks.items()
            if info.get("tier") == SISTERS
        ]
        steps = {
            (s, n): self.step(f"admit {n} to {s}", "admit_task", pool=key, suite=s, name=n) for s, n in asked
        }
        for (suite, name), found in self.stage("admit tasks", steps).items():
            judged = verdict(found, measure.admit_own_gain, measure.admit_sister_gain)
            self.found.admitted_tasks.setdefault(suite, {})[name] = judged

    def sign(self, records: dict[str, dict[str, Any]]) -> None:
        """Adds data signatures, if a system reads them, to experts that have a task and brought none.

        An expert that gets none stays in the pool; the systems that need it report that.
        """
        able = {e.name for e in self.recipe.pool_entries if self.recipe.needs_signatures}
        steps = {
            name: self.step(f"sign {name}", "signature", name=name, folder=record["folder"])
            for name, record in records.items()
            if name in able and not ("taken" in record and "signature" in record)
        }
        for name, signature in self.stage("sign", steps).items():
            records[name] = records[name] | signature

    def gather(self, records: Mapping[str, Mapping[str, Any]]) -> Pool:
        if not records:
            why = next(iter(self.found.failed.values()), "there are no tasks")
            if self.found.admission and not self.found.failed:
                raise RecipeError("no expert gains over the base on its own task, so there is no pool.")
            raise RecipeError(
                f"no expert could be taken or trained, so there is no pool. The first reason: {why}"
            )
        pool = Pool([Expert.load(self.out / "experts" / r["folder"], name=n) for n, r in records.items()])
        pool.save(self.out / "pool")
        return pool

    def leave_out(self, pool: Pool) -> None:
        """Drops tasks that can't be compared under all systems."""
        for suite, tasks in self.found.tasks.items():
            for name, info in list(tasks.items()):
                if suite == IN_POOL and name not in pool.names:
                    # Its mean says how well a pool does on its own tasks.
                    why = "its expert couldn't be taken or trained"
                    if name in self.found.admission:
                        why = "its expert doesn't gain over the base, and isn't in the pool"
                elif ORACLE in self.recipe.all_systems and not info["choice_rows"]:
                    why = "it has no rows for the oracle to choose on: leave that system out to measure it"
                elif not (why := self.not_admitted(pool, suite, name)):
                    continue
                del tasks[name]
                self.found.left_out[suite][name] = why

    def not_admitted(self, pool: Pool, suite: str, name: str) -> str:
        """Why a suite's task doesn't count by the recipe's rule of admission; "" if it does, or if there is none."""
        info = self.found.tasks[suite][name]
        if not self.recipe.measure.admit_rows:
            return ""
        if info.get("tier") == SAME_DATASET and not set(info["sisters"]) & set(pool.names):
            return "the expert of its dataset isn't in the pool"
        if info.get("tier") != SISTERS:
            return ""
        judged = self.found.admitted_tasks.get(suite, {}).get(name)
        if judged is None:
            return "it couldn't be found out whether it is admitted"
        return "" if judged["admitted"] else f"not admitted: {judged['why']}"

    def choose(self, pool: Pool, key: str) -> None:
        """Trains the multitask expert, and chooses the experts of systems that go by labels.

        Both are one stage: the training alone would keep one worker busy and leave the others idle.
        """
        tasks, systems = self.found.tasks, self.recipe.all_systems
        wanted = [s for s in systems if s in CHOSEN]
        rows = {s: [n for n, info in found.items() if info["choice_rows"]] for s, found in tasks.items()}
        steps: dict[Any, Step] = {}
        if MULTITASK in systems:
            steps[MULTITASK] = self.step("train multitask", "multitask", names=list(pool.names))
        named = {s: {n: info.get("sisters", []) for n, info in found.items()} for s, found in tasks.items()}
        for s, names in rows.items():
            for e in pool.names:
                # Only a system that compares all experts needs to know each on each task.
                asked = names if {*wanted} - {SISTER} else [n for n in names if e in named[s][n]]
                if asked and wanted:
                    steps[s, e] = self.step(
                        f"choose {e} on {s}", "choose", pool=key, expert=e, suite=s, tasks=asked
                    )
        values = self.stage("choose", steps)
        self.found.multitask = values.get(MULTITASK)
        chosen = self.found.chosen = {system: {} for system in wanted}
        for suite, names in rows.items():
            made = {e: values[suite, e] for e in pool.names if (suite, e) in values}
            self.found.failed |= _unscored(suite, names, {e: value["failed"] for e, value in made.items()})
            best = picks({e: v["scores"] for e, v in made.items()}, names, list(tasks[suite]), named[suite])
            for system in wanted:
                chosen[system][suite] = best[system]
        if OWN in systems:
            chosen[OWN] = {IN_POOL: {n: n for n in tasks.get(IN_POOL, {})}}
        if OWN in systems and self.recipe.measure.own_experts:
            for suite, found in tasks.items():
                if suite != IN_POOL:
                    chosen[OWN][suite] = _owners(found, pool.names)

    def measure(self, key: str) -> None:
        steps, together = {}, self.found.multitask
        for system in self.recipe.all_systems:
            self.found.files[system] = {}
            if system == MULTITASK and together is None:
                continue  # the expert in its folder would be of other data
            for suite, tasks in self.found.tasks.items():
                experts = self.found.chosen.get(system, {}).get(suite, {})
                if system == MULTITASK and together is not None:
                    experts = dict.fromkeys(tasks, str(together["hash"]))
                # A system that is told its expert can't be measured on a task for which none was chosen.
                names = [n for n in tasks if system not in TOLD or n in experts]
                if names:
                    steps[system, suite] = self.step(
                        f"measure {system} on {suite}", "measure", pool=key, system=system, suite=suite, tasks=names,
                        experts=experts,
                    )  # fmt: skip
        for (system, suite), value in self.stage("measure", steps).items():
            self.found.files[system][suite] = value["scores"]
            self.found.failed |= _unmeasured(f"{system} on {suite}", **value)

    def contaminated(self, pool: Pool) -> None:
        suites = {s: list(tasks) for s, tasks in self.found.tasks.items() if tasks}
        # Of other experts, no task says which rows they saw.
        known = [e.name for e in self.recipe.pool_entries if e.name in pool.names]
        step = self.step("contamination", "contamination", words=RUN_WORDS, suites=suites, trained=known)
        values = self.stage("contamination", {"all": step} if known else {})
        found = values.get("all", {"suites": {}, "read": []})
        self.found.contamination = {**found, "unread": [n for n in pool.names if n not in found["read"]]}

    def trace(self, key: str) -> None:
        """Traces the pool for the page, if the recipe asks for it."""
        if not self.recipe.page.prompts:
            return
        suites = {s: list(tasks) for s, tasks in self.found.tasks.items() if tasks}
        steps = {"all": self.step("trace", "trace_pool", pool=key, suites=suites)}
        for seen in self.stage("trace", steps).values():
            self.prompts = seen.prompts
            self.found.traced = {"shares": seen.shares, "layers": seen.layers}
            self.found.experts = with_cards(self.found.experts, seen.cards)


def _owners(tasks: Mapping[str, Any], pool: Sequence[str]) -> dict[str, str | None]:
    """Task → the expert of its own data: for test rows of an expert's own dataset that expert, else one outside the
    pool, which is named after the task."""
    owners: dict[str, str | None] = {}
    for name, info in tasks.items():
        if info.get("tier") == SAME_DATASET:
            expert = next((e for e in info["sisters"] if e in pool), None)
        else:
            expert = name if info.get("tier") else None
        if expert is not None:
            owners[name] = expert
    return owners


def _unscored(suite: str, tasks: Sequence[str], failed: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """{what: why} of tasks that couldn't be chosen on; a task that fails with every expert is named once."""
    found = {}
    for task in tasks:
        whys = {expert: mine[task] for expert, mine in failed.items() if task in mine}
        if whys and len(whys) == len(failed):
            found[f"choose on {suite}: {task}"] = next(iter(whys.values()))
        else:
            found |= {f"choose {expert} on {suite}: {task}": why for expert, why in whys.items()}
    return found


def _unmeasured(what: str, scores: Mapping[str, str], failed: Mapping[str, str]) -> dict[str, str]:
    """{what: why} of tasks that couldn't be measured; a system that fails everywhere in one way is named once."""
    if len(failed) > 1 and not scores and len(set(failed.values())) == 1:
        return {f"{what} (all {len(failed)} tasks)": next(iter(failed.values()))}
    return {f"{what}: {task}": why for task, why in failed.items()}
