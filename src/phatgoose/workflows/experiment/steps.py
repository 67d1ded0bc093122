"""The steps of an experiment, as functions of plain data that any process can run.

Each step finds what it made before and does only what is missing, so it may be killed and run again at any time.
`worker.py` is what a process keeps between steps.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phatgoose.errors import PhatgooseError, TaskError
from phatgoose.evaluation.statistics import paired_difference
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256_json
from phatgoose.records import Example, Task, TaskScore, groups_of
from phatgoose.routers import PHATGOOSE, Single
from phatgoose.tasks.contamination import ContaminationCheck
from phatgoose.tasks.lists.entries import SAME_DATASET, Entry
from phatgoose.tasks.lists.named import Suite
from phatgoose.tasks.lists.same_dataset import datasets_of
from phatgoose.tasks.load import is_local, without_path, without_paths
from phatgoose.tasks.tokenizer_loss import tokenizer_loss
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.training.gate import match_to_base
from phatgoose.training.trainer.rows import draw_rows
from phatgoose.workflows.contribute import contribute, contribution_key, record, sign, sizes
from phatgoose.workflows.experiment.executors import why
from phatgoose.workflows.experiment.measures.values import answers_of
from phatgoose.workflows.experiment.page import page_names
from phatgoose.workflows.experiment.recipe import IN_POOL
from phatgoose.workflows.experiment.scores import RESAMPLES
from phatgoose.workflows.experiment.systems import MULTITASK, OTHER, OWN, standing
from phatgoose.workflows.experiment.worker import Run, WorkerState, worker_state
from phatgoose.workflows.page import TraceReport, TraceRequest, traced


def check_tasks(run: Run, suite: str) -> dict[str, Any]:
    """Loads every task of a suite: task → {spec, hash, rows, …, what the tokenizer can't write}, or → {"error"}."""
    state = worker_state(run)
    found: dict[str, Any] = {}
    for entry in state.suites[suite].entries:
        try:
            task = state.task(suite, entry.name)
            if not task.test or (suite == IN_POOL and not task.train):
                raise PhatgooseError(f"it has {len(task.test)} test and {len(task.train)} training rows.")
            lost, measure = tokenizer_loss(state.base.tokenizer, task), state.recipe.measure
            test, choice = task.test[: measure.test_rows], task.validation[: measure.choice_rows]
            found[entry.name] = {
                "spec": _spec(entry), "hash": task.hash, "train_rows": len(task.train),
                "test_rows": len(test), "raw_rows": len(set(groups_of(test))), "metric": entry.metric,
                "note": entry.note, **_near(state.suites[suite], entry),
                "commonest": None if entry.metric else commonest(test), "chance": chance(test),
                "choice_rows": len(choice), "choice_raw_rows": len(set(groups_of(choice))),
                "source": without_paths(task.source),
                "lost": {"answers": lost.answers, "prompt": lost.prompt, "left_out": lost.too_much},
                **({"answers": answers_of(test)} if measure.measures else {}),
            }  # fmt: skip
        except Exception as error:  # of any kind: the other tasks go on
            found[entry.name] = {"error": why(error)}
    return found


def _near(suite: Suite, entry: Entry) -> dict[str, Any]:
    """How near the task is to which experts, where its list says so: for tables by tier, cluster, skill and domain."""
    if not entry.skill:
        return {}
    said = {"tier": entry.tier, "cluster": entry.cluster, "skill": entry.skill, "domain": entry.domain}
    return said | {"sisters": list(entry.sisters), "same_domain": list(suite.same_domain(entry))}


def _spec(entry: Entry) -> str:
    return " + ".join(without_path(spec) for spec in entry.specs)


def commonest(rows: Sequence[Example]) -> float:
    """The share of rows for which the most frequent right answer is right: what always giving it would score."""
    found = Counter(answer for row in rows for answer in set(row.targets))
    return found.most_common(1)[0][1] / len(rows)


def chance(rows: Sequence[Example]) -> float | None:
    """What a random choice among each row's choices scores on average; None if no row has choices."""
    shares = [sum(c in row.targets for c in row.choices) / len(row.choices) for row in rows if row.choices]
    return sum(shares) / len(rows) if shares else None


def train(run: Run, name: str) -> dict[str, Any]:
    """One contributor's work: an expert and its gates. Returns the expert's record."""
    state = worker_state(run)
    recipe, task = state.recipe, state.task(IN_POOL, name)
    folder = state.expert_folder(next(e for e in recipe.pool_entries if e.name == name))
    return _contributed(state, task, folder, recipe.expert, recipe.gate)


def _contributed(
    state: WorkerState, task: Task, folder: Path, config: ExpertConfig, gate: GateConfig | None
) -> dict[str, Any]:
    """The record of an expert that is there or is trained now. Work on other data or settings is removed."""
    key = contribution_key(state.base, task, config, gate)
    work = state.out / "work" / f"{folder.name}-{key[:10]}"
    for other in work.parent.glob(f"{folder.name}-*"):
        if other != work:
            shutil.rmtree(other, ignore_errors=True)
    expert = contribute(state.base, task, config, gate, name=task.name, folder=folder, work=work)
    return {**record(expert, task), "folder": folder.name, "hash": expert.hash, "key": key}


def take(run: Run) -> dict[str, Any]:
    """Copies the experts that the recipe takes from a pool: {"taken": {name: record}, "failed": {name: why}}.

    Raises:
        PoolError: the pool can't be read. UnknownName, RecipeError: as `ExperimentRecipe.taken`.
    """
    state = worker_state(run)
    pool = Pool.load(state.recipe.pool.folder)
    tasks = {e.name: e for e in state.recipe.pool_entries}
    taken, failed = {}, {}
    for name in state.recipe.taken(pool.names):
        expert = pool[name]
        brought = None if expert.signature is None else expert.signature.hash
        place = state.out / "experts" / f"{name}-{sha256_json([expert.hash, brought])[:10]}"
        try:
            match_to_base(state.base, expert)
            # A copy that an earlier run signed has the same hash, and keeps its signature.
            if not place.exists() or Expert.load(place).hash != expert.hash:
                expert.save(place)
        except Exception as error:
            failed[name] = why(error)
            continue
        task = tasks.get(name)
        taken[name] = {
            "name": name, "task": task and task.name, "spec": task and _spec(task), "taken": True,
            **sizes(expert), "folder": place.name, "hash": expert.hash, "trained_on": _trained_on_specs(expert),
        }  # fmt: skip
        if brought is not None:
            taken[name]["signature"] = brought
    return {"taken": taken, "failed": failed}


def _trained_on_specs(expert: Expert) -> list[str] | None:
    """The specs that an expert's record says it was trained on; None if it names none that can be parsed.

    Local files are left out: a record keeps only their name, and files of one name may differ. (A local folder that
    `hf:` read counts as a dataset of its name.)
    """
    task = expert.provenance.get("task")
    source = task.get("source") if isinstance(task, Mapping) else None
    parts = source.get("parts", [source]) if isinstance(source, Mapping) else []
    specs = [p.get("spec") for p in parts if isinstance(p, Mapping)] if isinstance(parts, list) else []
    return [s for s in specs if isinstance(s, str) and _is_comparable(s)] or None


def _is_comparable(spec: str) -> bool:
    try:
        return not is_local(spec) and bool(datasets_of(spec))
    except TaskError:
        return False


def admit(run: Run, name: str, folder: str) -> dict[str, Any]:
    """What an expert gains over the base on validation rows of its own task: {"gain", "low", "high", "rows"}."""
    state = worker_state(run)
    task, limit = state.task(IN_POOL, name), state.recipe.pool.admit_rows
    if not task.validation:
        raise PhatgooseError("it has no validation rows, by which [pool] admit_rows admits experts.")
    base = state.scores.score(task, None, None, split="validation", limit=limit)
    expert = Expert.load(state.out / "experts" / folder, name=name)
    found = _gain(state, task, expert, base, limit)
    return {key: found[key] for key in ("gain", "low", "high")} | {"rows": base.rows}


def admit_task(run: Run, pool: str, suite: str, name: str) -> dict[str, Any]:
    """What a suite's task's own expert and each of its sisters gain over the base on the own expert's validation rows.

    Returns {"rows", "base", "own", "sisters": {name: …}}, each expert with {"mean", "gain", "low", "high"}.
    """
    state = worker_state(run, pool)
    own, limit = state.own_expert(suite, name), state.recipe.measure.admit_rows
    task = state.task(suite, name, trained_on=True)
    if not task.validation:
        raise PhatgooseError("it has no validation rows, by which [measure] admit_rows admits tasks.")
    base = state.scores.score(task, None, None, split="validation", limit=limit)
    sisters = [state.pool[s] for s in state.entry(suite, name).sisters if s in state.pool.names]
    return {
        "rows": base.rows,
        "base": base.mean,
        "own": _gain(state, task, own, base, limit),
        "sisters": {s.name: _gain(state, task, s, base, limit) for s in sisters},
    }


def _gain(state: WorkerState, task: Task, expert: Expert, base: TaskScore, limit: int) -> dict[str, float]:
    """An expert alone on a task's first validation rows, and its paired difference to the base's score there."""
    alone = state.scores.score(task, Pool([expert]), Single(0), split="validation", limit=limit)
    points = [[p.points for p in score.predictions] for score in (alone, base)]
    groups = groups_of(task.validation[:limit])
    gain, low, high = paired_difference(*([p] for p in points), groups=[groups], resamples=RESAMPLES)
    return {"mean": alone.mean, "gain": gain, "low": low, "high": high}


def signature(run: Run, name: str, folder: str) -> dict[str, Any]:
    """Adds the contributor's data signature to an expert. Returns what it adds to the expert's record."""
    state = worker_state(run)
    place = state.out / "experts" / folder
    work = state.out / "work" / f"{folder}.signature"
    signed = sign(state.base, state.task(IN_POOL, name), state.recipe.signature, folder=place, work=work)
    assert signed.signature is not None
    made = signed.provenance["signature"]
    return {"signature": signed.signature.hash} | {
        f"signature_{k}": made[k] for k in ("seconds", "rows", "texts")
    }


def multitask(run: Run, names: list[str]) -> dict[str, Any]:
    """What pooling all contributors' data would give: one expert on the union of their rows. Returns its record.

    It sees the rows that each task's expert was trained on, as often as that expert did. Drawn from all rows
    instead, a task with many rows would be most of what it learns. Validation rows are taken evenly from all tasks.
    """
    state = worker_state(run)
    config, own = state.recipe.multitask or state.recipe.expert, state.recipe.expert
    tasks = [state.task(IN_POOL, n) for n in names]
    # The same draw as in each expert's own training, so that the union holds exactly what the experts saw.
    seen = [draw_rows(len(t.train), own.steps * own.rows_per_step, own.seed) for t in tasks]
    train = tuple(t.train[i] for t, rows in zip(tasks, seen, strict=True) for i in rows)
    each = max(1, config.validation_rows // len(tasks))
    validation = tuple(e for t in tasks for e in t.validation[:each])
    parts = [{"name": t.name, "hash": t.hash} for t in tasks]
    union = Task(MULTITASK, train, validation, (), {"spec": MULTITASK, "source": "union", "parts": parts})
    made = _contributed(state, union, state.multitask_folder(names), config, None)
    return {k: v for k, v in made.items() if k != "key"}


def choose(run: Run, pool: str, expert: str, suite: str, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """One expert on the validation rows of a suite's tasks: {"scores": {task: standing}, "failed": {task: why}}."""
    state = worker_state(run, pool)
    alone, limit = Pool([state.pool[expert]]), state.recipe.measure.choice_rows

    def chosen_by(name: str) -> list[float | None]:
        task = state.task(suite, name)
        score = state.scores.score(task, alone, Single(0), split="validation", limit=limit)
        return standing(score, task.validation[:limit])

    return _each(tasks, chosen_by)


def _each(tasks: Sequence[str], function: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
    """The function of every task, {"scores": …, "failed": {task: why}}: a task that fails costs only itself."""
    scores: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in tasks:
        try:
            scores[name] = function(name)
        except Exception as error:
            failed[name] = why(error)
    return {"scores": scores, "failed": failed}


def measure(
    run: Run,
    pool: str,
    system: str,
    suite: str,
    tasks: list[str],
    experts: Mapping[str, str | None],
) -> dict[str, dict[str, str]]:
    """One system on tasks, with the `experts` that act: {"scores": {task: file}, "failed": {task: why}}."""
    state = worker_state(run, pool)
    kind, _, spec = system.partition(":")

    def measured(name: str) -> str:
        task, limit = state.task(suite, name), state.recipe.measure.test_rows
        if system == OWN and suite != IN_POOL and state.entry(suite, name).tier != SAME_DATASET:
            alone = Pool([state.own_expert(suite, name)])  # not one of the pool
            return state.scores.measure(task, alone, Single(0), limit=limit).name
        if kind != OTHER:
            return state.scores.measure(task, *state.system(system, experts.get(name)), limit=limit).name
        other = state.other(spec)
        if (lost := tokenizer_loss(other.base.tokenizer, task)).too_much:
            raise PhatgooseError(f"{spec}'s tokenizer can't write it: {lost}.")
        return other.measure(task, None, None, limit=limit).name

    return _each(tasks, measured)


def trace_pool(run: Run, pool: str, suites: Mapping[str, list[str]]) -> TraceReport:
    """PHATGOOSE's choices on every measured task: what the page shows beside the numbers."""
    state = worker_state(run, pool)
    tasks = [
        replace(state.task(suite, task), name=name) for (suite, task), name in page_names(suites).items()
    ]
    request = TraceRequest(tasks, shown=state.recipe.page.prompts)
    return traced(state.base, state.pool, PHATGOOSE(), request, state.options)


def contamination(
    run: Run, words: int, suites: Mapping[str, list[str]], trained: list[str]
) -> dict[str, Any]:
    """Which measured rows share `words` words in a row with a training row: {"suites": {suite: {task: …}}, "read": …}.

    "read" names the experts whose training rows were compared. An expert that was taken is among them only if its
    record names the very rows of its task. A task of "in-pool" is compared with the other experts' rows: with its
    own it may share passages.
    """
    state, found = worker_state(run), ContaminationCheck(words)
    asked = [(suite, name) for suite, tasks in suites.items() for name in tasks]
    for suite, name in asked:
        rows = state.task(suite, name).test[: state.recipe.measure.test_rows]
        found.add_held_out(name, rows, own=name if suite == IN_POOL else None)
    read = []
    for name in trained:
        try:
            task = state.task(IN_POOL, name)
        except PhatgooseError:  # an expert that was taken: results say that its rows weren't compared
            continue
        saw = state.pool[name].provenance.get("task")
        if isinstance(saw, Mapping) and saw.get("hash") == task.hash:
            found.compare(name, task.train)
            read.append(name)
    by_suite: dict[str, Any] = {suite: {} for suite in suites}
    for (suite, name), one in zip(asked, found.results, strict=True):
        flagged, trained_with = sorted(one.flagged_rows), list(one.shared_with)
        by_suite[suite][name] = {"rows": one.rows, "flagged": flagged, "trained": trained_with}
    return {"suites": by_suite, "read": read}
