"""Experts without gates: how much of trained gates' quality other scores recover, on the quickstart's pool.

The other scores are those from weights, and gates that are trained on generated text.

    python benchmarks/ungated.py --pool quickstart-out/pool --out build/ungated

Tasks, rows and gate settings are the quickstart's. The settings that are fixed here were chosen on validation
rows, before any test row was measured. After an interruption the same command continues. The results are in
docs/results.md, "Experts without gates".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_machine import options_parser

from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import write_json
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.base import Base
from phatgoose.models.base.load import load_base
from phatgoose.models.trace.record import trace
from phatgoose.ops.reference import standardise
from phatgoose.records import Task, TaskScore
from phatgoose.routers import LAG, PHATGOOSE, Arrow, Router, SpectR, Uniform, WeightOnly
from phatgoose.routers.router import BoundRouter, Candidates
from phatgoose.routers.weights import Calibrated
from phatgoose.training.config import WritingConfig
from phatgoose.training.generated import train_generated_gate
from phatgoose.workflows.experiment.recipe import IN_POOL
from phatgoose.workflows.experiment.results import against, interval, made, resampled_means, share_of_gain
from phatgoose.workflows.experiment.scores import ScoreCache
from phatgoose.workflows.experiment.systems import BASE, ORACLE
from phatgoose.workflows.experiment.worker import WorkerState
from phatgoose.workflows.quickstart import quickstart_recipe

QUICKSTART = quickstart_recipe()
TOP_K = 2

WRITING = WritingConfig(rows=256, temperature=1.0, max_new_tokens=48)
HALVES = ((0, 2, 4), (1, 3, 5))
"""Experts whose gates are left out of the mixed pools: each expert is once with its gate and once without."""
PROFILE_ROWS = 16
"""Validation rows a task on which the experts' shares of the weight are read off."""
TRUE = "true gates"


@dataclass(frozen=True)
class StandardisedGates(PHATGOOSE):
    """True gates with the scores of mixed pools: separates the effect of standardising from that of the weights."""

    def bind(self, candidates: Candidates) -> BoundRouter:
        bars = [None if g is None else standardise(g.double()).float() for g in candidates.gates]
        return Calibrated(candidates, bars, self.top_k, type(self).__name__)


@dataclass(frozen=True)
class System:
    """A row of the table."""

    name: str
    note: str
    pool: Pool | None
    router: Router | None


def systems(pool: Pool) -> list[System]:
    k, mixed = TOP_K, PHATGOOSE(TOP_K, "weights")
    return [
        System("base", "the base model alone", None, None),
        System(TRUE, "PHATGOOSE, gates from the contributors' data", pool, PHATGOOSE(k)),
        System(
            "weights",
            "‖Vᵀū‖ standardised on the reference text, two experts: a pool without gates",
            pool,
            WeightOnly(k),
        ),
        System(
            "mixed, half A",
            "every other expert by its gate, the others by weights",
            without(pool, HALVES[0]),
            mixed,
        ),
        System("mixed, half B", "the other way round", without(pool, HALVES[1]), mixed),
        System("Arrow", "|v₁ᵀu|, two experts", pool, Arrow(k)),
        System("SpectR", "‖S Vᵀu‖, two experts", pool, SpectR(k)),
        System("LAG", "‖Vᵀu‖, one expert", pool, LAG()),
        System("uniform", "all experts with equal weights", pool, Uniform()),
        System(
            "true gates, standardised",
            "the true gates, scores standardised on the reference text",
            pool,
            StandardisedGates(k),
        ),
    ]


def generated_systems(pool: Pool) -> list[System]:
    """The systems of the pool whose gates were trained without data."""
    k = TOP_K
    return [
        System(
            "generated gates",
            "PHATGOOSE, gates from text that the base writes with the expert",
            pool,
            PHATGOOSE(k),
        ),
        System(
            "generated gates, standardised",
            "the same gates, scores standardised on the reference text",
            pool,
            StandardisedGates(k),
        ),
    ]


def without(pool: Pool, places: tuple[int, ...]) -> Pool:
    """The pool with these experts' gates left out."""
    return Pool([replace(e, gates=None) if i in places else e for i, e in enumerate(pool.experts)])


def generated_pool(base: Base, pool: Pool, out: Path) -> Pool:
    """The experts with gates trained without their data; finished ones are read."""
    experts = []
    for expert in pool.experts:
        folder = out / "generated" / expert.name
        if not folder.exists():
            bare = replace(expert, gates=None)
            work = out / "work" / expert.name
            train_generated_gate(base, bare, QUICKSTART.gate, WRITING, work_folder=work).save(folder)
        experts.append(Expert.load(folder))
    return Pool(experts)


def load_tasks(out: Path) -> dict[str, list[Task]]:
    """The quickstart's tasks: suite → tasks."""
    state = WorkerState(QUICKSTART, out)
    return {
        suite: [state.task(suite, e.name) for e in found.entries] for suite, found in state.suites.items()
    }


def own_shares(base: Base, system: System, tasks: list[Task]) -> dict[str, float]:
    """Share of the routing weight that each task's own expert gets on prompts of its validation rows, over
    modules and tokens."""
    assert system.pool is not None
    route(base, system.pool, system.router)
    found = {}
    try:
        for place, task in enumerate(tasks):  # the pool's experts are in the order of the tasks
            with trace(base) as recorded, torch.no_grad():
                for row in task.validation[:PROFILE_ROWS]:
                    base.model(**base.tokenizer([row.input], return_tensors="pt").to(base.device))
            shares = torch.stack(list(recorded.shares().values())).mean(0)
            found[task.name] = round(float(shares[place]), 4)
    finally:
        unroute(base)
    return found


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--pool", type=Path, default=Path("quickstart-out/pool"))
    parser.add_argument("--out", type=Path, default=Path("build/ungated"))
    parser.add_argument("--dtype", default="bfloat16", help="the quickstart's, where it was measured")
    options = parser.parse_args()
    base, pool, tasks = (
        load_base(QUICKSTART.base, dtype=options.dtype),
        Pool.load(options.pool),
        load_tasks(options.out),
    )
    cache = ScoreCache(base, options.out / "scores")
    every = [task for group in tasks.values() for task in group]
    table: dict[str, dict[str, TaskScore]] = {}
    shares: dict[str, dict[str, float]] = {}

    def measure(system: System) -> None:
        table[system.name] = {
            t.name: cache.score(t, system.pool, system.router, limit=QUICKSTART.measure.test_rows)
            for t in every
        }
        if system.router is not None:
            shares[system.name] = own_shares(base, system, tasks[IN_POOL])
        means = {g: sum(table[system.name][t.name].mean for t in ts) / len(ts) for g, ts in tasks.items()}
        print(system.name, {g: round(m, 3) for g, m in means.items()}, shares.get(system.name), flush=True)

    listed = systems(pool)
    for system in listed:
        measure(system)
    generated = generated_pool(base, pool, options.out)
    for system in generated_systems(generated):
        measure(system)
        listed.append(system)
    write_json(options.out / "results.json", results(base, generated, tasks, listed, table, shares))


def results(
    base: Base,
    generated: Pool,
    tasks: dict[str, list[Task]],
    listed: list[System],
    table: dict[str, dict[str, TaskScore]],
    shares: dict[str, dict[str, float]],
) -> dict[str, Any]:
    groups = {group: [t.name for t in ts] for group, ts in tasks.items()}
    names = [s.name for s in listed]
    drawn = {group: resampled_means(table, members) for group, members in groups.items()}
    # The share of the true gates' gain over the base: `share_of_gain` with the true gates in the oracle's place.
    gates_as_oracle = [{**part, ORACLE: part[TRUE]} for part in drawn[IN_POOL]]

    def minus(other: str) -> dict[str, list[dict[str, Any]]]:
        """Every system minus another one, by its name: a row for each group."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names if name != other}
        for group, (means, resamples) in drawn.items():
            for name, row in against(means, resamples, other).items():
                values = {key: row[key] for key in ("difference", "low", "high")}
                found[name].append({"group": group, "a": name, "b": other, **values})
        return found

    return {
        "format": "phatgoose-ungated",
        "version": 1,
        "made": made(0.0),
        "base": {
            "spec": base.spec,
            "dtype": str(base.model.dtype),
            "fingerprint": base.fingerprint.to_json(),
        },
        "settings": {
            "writing": asdict(WRITING),
            "gate": asdict(QUICKSTART.gate),
            "halves": HALVES,
            "test_rows": QUICKSTART.measure.test_rows,
            "top_k": TOP_K,
        },
        "tasks": {t.name: t.hash for ts in tasks.values() for t in ts},
        "systems": [
            {
                "name": s.name,
                "note": s.note,
                "router": None if s.router is None else s.router.describe(),
                "scores": {
                    t: {"mean": x.mean, "low": x.low, "high": x.high} for t, x in table[s.name].items()
                },
                "groups": {
                    g: {"mean": means[s.name], **interval(d[s.name])} for g, (means, d) in drawn.items()
                },
                "own_shares": shares.get(s.name),
            }
            for s in listed
        ],
        "minus_true_gates": minus(TRUE),
        "minus_base": minus(BASE),
        "recovered": {n: share_of_gain(gates_as_oracle[0], gates_as_oracle[1], n) for n in names},
        "generated": {
            e.name: {k: e.provenance["gate"][k] for k in ("task", "seconds", "losses", "validation_losses")}
            for e in generated.experts
        },
    }


if __name__ == "__main__":
    main()
