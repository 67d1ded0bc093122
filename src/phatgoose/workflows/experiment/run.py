"""An experiment from its recipe: train, choose, measure, compare, and report.

Everything lies in one folder: recipe.json, experts/, pool/, scores/, results.json, results.md, plot.svg, a page,
and work/, which holds what an interrupted training needs. A second run finds every finished step again. Steps run
through an executor; this driver itself loads no base.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from phatgoose.analysis.page import RoutedPrompt, report
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256_json, write_bytes, write_json
from phatgoose.tasks.contamination import RUN_WORDS
from phatgoose.tasks.lists.entries import Entry, check_no_shared_data
from phatgoose.workflows.experiment.board import Board
from phatgoose.workflows.experiment.documents import markdown, plot
from phatgoose.workflows.experiment.executors import Executor, Inline, Outcome, Step
from phatgoose.workflows.experiment.oracle import picks
from phatgoose.workflows.experiment.page import page_data
from phatgoose.workflows.experiment.recipe import IN_POOL, ExperimentRecipe, RecipeError, without_own_copies
from phatgoose.workflows.experiment.results import Findings, results_of
from phatgoose.workflows.experiment.systems import CHOSEN, MULTITASK, ORACLE, OWN, TOLD
from phatgoose.workflows.run_folder import clear, locked_folder
from phatgoose.workflows.traced import with_cards

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
            could be taken or trained. TaskError: an expert that is taken was trained on what a suite measures.
    """
    out = Path(out)
    with locked_folder(out, kind):
        if fresh:
            clear(out)
        run = _Run(recipe, out, executor or Inline(), console or Console(stderr=True))
        with run.board:
            results = run.all()
        _write(out, results, run.prompts, page=f"{kind}.html")
        return results


def _write(out: Path, results: Mapping[str, Any], prompts: Sequence[RoutedPrompt], page: str) -> None:
    write_json(out / "results.json", results)
    write_bytes(out / "results.md", markdown(results).encode())
    write_bytes(out / "plot.svg", plot(results).encode())
    data = page_data(results)
    if data["tasks"] and data["systems"]:
        report(data, prompts, out=out / page)


class _Run:
    def __init__(self, recipe: ExperimentRecipe, out: Path, executor: Executor, console: Console):
        self.recipe, self.out, self.executor = recipe, out, executor
        self.board = Board(console)
        self.failed: dict[str, str] = {}
        self.prompts: list[RoutedPrompt] = []
        # The number makes processes that worked for an earlier run read their data again.
        self.common = {
            "run": {"recipe": recipe.to_json(), "out": str(out.absolute()), "number": secrets.token_hex(8)}
        }

    def all(self) -> dict[str, Any]:
        started = time.monotonic()
        write_json(self.out / "recipe.json", self.recipe.to_json())
        taken, refused = self.take()
        tasks, left_out = self.check()
        records = self.train(left_out.get(IN_POOL, {}), taken, refused)
        self.sign(records)
        pool = self.gather(records)
        self.without_experts(pool, tasks, left_out)
        self.without_choice(tasks, left_out)
        # Steps name the pool by its content: a worker that loaded another one reads it again.
        signatures = [e.signature.hash for e in pool.experts if e.signature is not None]
        key = sha256_json([*(e.hash for e in pool.experts), *signatures])
        together, chosen = self.choose(pool, key, tasks)
        files = self.measure(key, tasks, chosen, together)
        contamination = self.contaminated(pool, tasks)
        traced, cards = self.trace(key, tasks)
        found = Findings(
            tasks=tasks, left_out=left_out, experts=with_cards([records[n] for n in pool.names], cards),
            multitask=together, files=files, chosen=chosen, contamination=contamination, traced=traced,
            failed=self.failed,
        )  # fmt: skip
        return results_of(self.recipe, self.out, found, time.monotonic() - started)

    def run(self, stage: str, steps: Sequence[Step]) -> dict[str, Outcome]:
        found = self.executor.run(steps, self.board.stage(stage, steps)) if steps else {}
        self.failed |= {name: o.error for name, o in found.items() if o.error is not None}
        return found

    def step(self, label: str, function: str, **arguments: Any) -> Step:
        return Step(label, f"{_STEPS}:{function}", self.common | arguments)

    def check(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
        """(suite → task → what is known of it, suite → task → why it is left out)."""
        wanted: dict[str, list[str]] = {}
        left_out: dict[str, dict[str, str]] = {}
        for one in self.recipe.suites:
            kept, missing = without_own_copies(self.recipe, one)
            left_out[one.name] = {
                name: f"needs your own copy of its data: give its folder (--folder {name}=FOLDER)"
                for name in missing
            }
            wanted[one.name] = [e.name for e in kept.entries]
        found = self.run("check", [self.step(f"check {s}", "check_tasks", suite=s) for s in wanted])
        tasks: dict[str, dict[str, Any]] = {}
        for suite in wanted:
            outcome = found[f"check {suite}"]
            rows = outcome.value if outcome.ok else {}
            tasks[suite] = {}
            for name, info in ((n, rows[n]) for n in wanted[suite] if n in rows):
                if "error" in info:
                    self.failed[f"{suite}: {name}"] = left_out[suite][name] = info["error"]
                elif info["lost"]["left_out"] and suite != IN_POOL:
                    share = max(info["lost"]["answers"], info["lost"]["prompt"])
                    left_out[suite][name] = (
                        f"the base's tokenizer can't write it ({share:.0%} of its answers or prompts are lost)"
                    )
                else:
                    tasks[suite][name] = info
        return tasks, left_out

    def take(self) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """(records of the experts taken from an existing pool, names of those that can't be taken)."""
        if not self.recipe.pool.folder:
            return {}, set()
        outcome = self.run("take", [self.step("take the pool's experts", "take")])["take the pool's experts"]
        if outcome.error is not None:
            raise RecipeError(outcome.error)
        taken = outcome.value["taken"]
        self.failed |= {f"take {name}": why for name, why in outcome.value["failed"].items()}
        said = [Entry(name, tuple(r["trained_on"])) for name, r in taken.items() if r["trained_on"]]
        for one in self.recipe.suites:
            if one.name != IN_POOL:
                check_no_shared_data(said, one.entries, one.refuses, one.name, self.recipe.folders)
        return taken, set(outcome.value["failed"])

    def train(
        self, left_out: Mapping[str, str], taken: Mapping[str, dict[str, Any]], refused: set[str]
    ) -> dict[str, dict[str, Any]]:
        """The records of all experts: those of the recipe's tasks in order, then the others that are taken.

        Args:
            left_out: tasks of "in-pool" that couldn't be loaded, which were reported already.
        """
        names = [e.name for e in self.recipe.pool_entries if e.name not in left_out or e.name in taken]
        steps = [
            self.step(f"train {n}", "train", name=n) for n in names if n not in taken and n not in refused
        ]
        found = self.run("train", steps)
        trained = {n: o.value for n in names if (o := found.get(f"train {n}")) is not None and o.ok}
        found_or_made = {**taken, **trained}
        return {n: found_or_made[n] for n in dict.fromkeys((*names, *taken)) if n in found_or_made}

    def sign(self, records: dict[str, dict[str, Any]]) -> None:
        """Adds data signatures, if a system reads them, to experts that have a task and brought none.

        An expert that gets none stays in the pool; the systems that need it report that.
        """
        able = [e.name for e in self.recipe.pool_entries]
        wanted = {
            n: r
            for n, r in records.items()
            if self.recipe.needs_signatures and n in able and not ("taken" in r and "signature" in r)
        }
        steps = [self.step(f"sign {n}", "signature", name=n, folder=r["folder"]) for n, r in wanted.items()]
        found = self.run("sign", steps)
        for name in wanted:
            if found[f"sign {name}"].ok:
                records[name] = records[name] | found[f"sign {name}"].value

    def gather(self, records: Mapping[str, Mapping[str, Any]]) -> Pool:
        if not records:
            why = next(iter(self.failed.values()), "there are no tasks")
            raise RecipeError(
                f"no expert could be taken or trained, so there is no pool. The first reason: {why}"
            )
        pool = Pool([Expert.load(self.out / "experts" / r["folder"], name=n) for n, r in records.items()])
        pool.save(self.out / "pool")
        return pool

    def without_experts(
        self, pool: Pool, tasks: dict[str, dict[str, Any]], left_out: dict[str, dict[str, str]]
    ) -> None:
        """Drops tasks from "in-pool" whose expert failed: its mean says how well a pool does on its own tasks."""
        for name in [n for n in tasks.get(IN_POOL, {}) if n not in pool.names]:
            del tasks[IN_POOL][name]
            left_out[IN_POOL][name] = "its expert couldn't be taken or trained"

    def without_choice(self, tasks: dict[str, dict[str, Any]], left_out: dict[str, dict[str, str]]) -> None:
        """Drops tasks without validation rows: they have no oracle, so they can't be compared under all systems."""
        if ORACLE in self.recipe.all_systems:
            for suite, found in tasks.items():
                for name in [n for n, info in found.items() if not info["choice_rows"]]:
                    del found[name]
                    left_out[suite][name] = (
                        "it has no rows for the oracle to choose on: leave that system out to measure it"
                    )

    def choose(
        self, pool: Pool, key: str, tasks: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any] | None, dict[str, dict[str, dict[str, str]]]]:
        """(the record of the multitask expert, if it is compared; system → suite → task → the expert that acts).

        Both are one stage: the training alone would keep one worker busy and leave the others idle.
        """
        wanted = [s for s in self.recipe.all_systems if s in CHOSEN]
        rows = {s: [n for n, info in found.items() if info["choice_rows"]] for s, found in tasks.items()}
        steps = [
            self.step(f"choose {e} on {s}", "choose", pool=key, expert=e, suite=s, tasks=names)
            for s, names in rows.items() for e in pool.names if names and wanted
        ]  # fmt: skip
        if MULTITASK in self.recipe.all_systems:
            steps.insert(0, self.step("train multitask", "multitask", names=list(pool.names)))
        found = self.run("choose", steps)
        trained = found.get("train multitask")
        together = trained.value if trained is not None and trained.ok else None
        chosen: dict[str, dict[str, dict[str, str]]] = {system: {} for system in wanted}
        for suite, names in rows.items():
            made = {e: o.value for e in pool.names if (o := found.get(f"choose {e} on {suite}")) and o.ok}
            self.failed |= _unscored(suite, names, {e: value["failed"] for e, value in made.items()})
            found_best = picks({e: value["scores"] for e, value in made.items()}, names, list(tasks[suite]))
            for system in wanted:
                chosen[system][suite] = found_best[system]
        if OWN in self.recipe.all_systems:
            chosen[OWN] = {IN_POOL: {n: n for n in tasks.get(IN_POOL, {})}}
        return together, chosen

    def measure(
        self,
        key: str,
        tasks: Mapping[str, Mapping[str, Any]],
        chosen: Mapping[str, Mapping[str, Mapping[str, str]]],
        together: Mapping[str, Any] | None,
    ) -> dict[str, dict[str, dict[str, str]]]:
        """system → suite → task → file of the score."""
        steps, asked = [], {}
        for system in self.recipe.all_systems:
            if system == MULTITASK and together is None:
                continue  # the expert in its folder would be of other data
            for suite, found in tasks.items():
                experts = dict(chosen.get(system, {}).get(suite, {}))
                if system == MULTITASK and together is not None:
                    experts = dict.fromkeys(found, str(together["hash"]))
                # A system that is told its expert can't be measured on a task for which none was chosen.
                names = [n for n in found if system not in TOLD or n in experts]
                if names:
                    name = f"measure {system} on {suite}"
                    asked[name] = (system, suite)
                    arguments = {
                        "pool": key,
                        "system": system,
                        "suite": suite,
                        "tasks": names,
                        "experts": experts,
                    }
                    steps.append(self.step(name, "measure", **arguments))
        files: dict[str, dict[str, dict[str, str]]] = {s: {} for s in self.recipe.all_systems}
        for name, outcome in self.run("measure", steps).items():
            system, suite = asked[name]
            if outcome.ok:
                files[system][suite] = outcome.value["scores"]
                self.failed |= _unmeasured(f"{system} on {suite}", **outcome.value)
        return files

    def contaminated(self, pool: Pool, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """{"suites": suite → task → rows that share text with training rows, "read" and "unread": experts whose
        rows were compared or not}."""
        suites = {s: list(found) for s, found in tasks.items() if found}
        # Of other experts, no task says which rows they saw.
        known = [e.name for e in self.recipe.pool_entries if e.name in pool.names]
        step = self.step("contamination", "contamination", words=RUN_WORDS, suites=suites, trained=known)
        outcome = self.run("contamination", [step])["contamination"] if known else Outcome()
        found = outcome.value or {"suites": {}, "read": []}
        return {**found, "unread": [n for n in pool.names if n not in found["read"]]}

    def trace(
        self, key: str, tasks: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """({"shares", "layers"}, experts' cards) for the page, if the recipe asks for them."""
        if not self.recipe.page.prompts:
            return {}, []
        suites = {suite: list(found) for suite, found in tasks.items() if found}
        outcome = self.run("trace", [self.step("trace", "trace_pool", pool=key, suites=suites)])["trace"]
        if not outcome.ok:
            return {}, []
        self.prompts = outcome.value.prompts
        return {"shares": outcome.value.shares, "layers": outcome.value.layers}, outcome.value.cards


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
