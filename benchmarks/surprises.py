"""Explains an experiment's results: which experts act on which rows, other choices of experts, the gates' geometry.

    python benchmarks/surprises.py EXPERIMENT WHAT [TASK ...]

    shares                 every router's weights on 16 validation rows of each in-pool task
    drop TASK ...          one to six experts a token, and every expert left out in turn
    longer TASK ...        a pool of these experts with the paper's 100 gate steps (minutes each)
    gates                  the gates' lengths and angles
    answers SUITE/TASK ... which choices every system and every single expert takes

EXPERIMENT is the folder that `phatgoose experiment` wrote, of a decoder-only base. Only validation rows of its
in-pool tasks are read. The exception is `answers`, which explains published scores and reads a task's measured
rows. The result is written into surprises-WHAT.json in that folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_machine import options_parser
from rich.console import Console
from rich.progress import track

from phatgoose.analysis.measures import expert_shares
from phatgoose.errors import PhatgooseError
from phatgoose.evaluation.run import evaluate
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256_json, write_json
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.module_names import layer_and_kind
from phatgoose.models.text.encoding import UNLIMITED, encode_answers
from phatgoose.models.trace.record import trace
from phatgoose.models.trace.result import Trace
from phatgoose.records import Example
from phatgoose.routers import PHATGOOSE, Router, Single
from phatgoose.training.gate import train_gate
from phatgoose.workflows.experiment.recipe import IN_POOL, ExperimentRecipe
from phatgoose.workflows.experiment.results import made
from phatgoose.workflows.experiment.worker import WorkerState

ANSWERED = ("phatgoose", "lag", "uniform", "ties", "fixed-random:seed=0")
SHARE_ROWS, DROP_ROWS, LONGER_ROWS = 16, 24, 60
PAPERS_STEPS = 100
TOP_K = (1, 2, 3, 6)
ROUTED = (
    "phatgoose",
    "arrow",
    "lag",
    "spectr",
    "weight-only",
    "average-activation",
    "retrieval",
    "centroid",
    "soft-centroid",
    "padded:8",
)


def shares(lab: WorkerState, console: Console) -> dict[str, Any]:
    """By router and task, over all tokens and modules: each expert's share of the weight while the prompt and
    its answer are read."""
    found: dict[str, Any] = {}
    for name in ROUTED:
        pool, router = lab.system(name, None)
        assert pool is not None
        try:
            route(lab.base, pool, router)
        except PhatgooseError as error:  # no data signatures, say
            console.print(f"{name}: {error}")
            continue
        try:
            found[name] = {t: _shares(lab, t) for t in track(tasks(lab), name, console=console)}
        finally:
            unroute(lab.base)
        own = {part: [v[part][t] for t, v in found[name].items()] for part in ("prompt", "answer")}
        console.print(
            name, {part: round(sum(v) / len(v), 3) for part, v in own.items()}, "own experts' mean share"
        )
    return found


@torch.inference_mode()
def _shares(lab: WorkerState, task: str) -> dict[str, Any]:
    base = lab.base
    with trace(base, histogram=True) as recorded:
        for row in lab.task(IN_POOL, task).validation[:SHARE_ROWS]:
            (pair,) = encode_answers(base, row, row.targets[:1], UNLIMITED)
            prompt, answer = (
                torch.tensor([ids], device=base.device) for ids in (pair.prompt_ids, pair.target_ids[:-1])
            )
            seen = base.model(prompt, use_cache=True).past_key_values
            # Nothing is predicted from the end token. With a cache, these tokens are counted separately from
            # the prompt's.
            base.model(answer, past_key_values=seen, use_cache=True)
    parts = {"prompt": False, "answer": True}
    found = {part: expert_shares(recorded, generated=g) for part, g in parts.items()}
    found["own, by module"] = _by_module(recorded, task)
    return {part: {name: round(v, 4) for name, v in shares.items()} for part, shares in found.items()}


def _by_module(recorded: Trace, task: str) -> dict[str, float]:
    """The own expert's share: the mean over the modules of a kind in each third of the layers."""
    shares, place = recorded.shares(), recorded.experts.index(task)
    where = layer_and_kind(list(shares))
    layers = 1 + max(layer or 0 for layer, _ in where)
    groups: dict[str, list[float]] = {}
    for share, (layer, kind) in zip(shares.values(), where, strict=True):
        third = ("first", "middle", "last")[3 * (layer or 0) // layers]
        groups.setdefault(f"{kind}, {third} third", []).append(float(share[place]))
    return {group: sum(v) / len(v) for group, v in groups.items()}


def drop(lab: WorkerState, console: Console, names: list[str]) -> dict[str, Any]:
    """By task: the score of one to six experts a token, of its own expert alone, and with every other expert
    left out of the pool."""
    found: dict[str, Any] = {}
    for task in names:

        def score(pool: Pool, router: Router, task: str = task) -> float:
            route(lab.base, pool, router)
            try:
                return evaluate(lab.base, lab.task(IN_POOL, task), split="validation", limit=DROP_ROWS).mean
            finally:
                unroute(lab.base)

        others = [n for n in lab.pool.names if n != task]
        found[task] = {
            "top_k": {str(k): score(lab.pool, PHATGOOSE(k)) for k in TOP_K},
            "own": score(Pool([lab.pool[task]]), Single(0)),
            "without": {
                n: score(Pool([e for e in lab.pool.experts if e.name != n]), PHATGOOSE())
                for n in track(others, task, console=console)
            },
        }
        console.print(task, found[task])
    return found


def longer(lab: WorkerState, console: Console, names: list[str]) -> dict[str, Any]:
    """In a pool of these experts alone, with the recipe's gates and with gates of 100 steps: scores, and own
    experts' shares."""
    config = replace(lab.recipe.gate, steps=PAPERS_STEPS)
    retrained = []
    for name in track(names, "gates", console=console):
        place = lab.out / "work" / f"longer-{sha256_json([lab.pool[name].hash, config.key()])[:16]}"
        if not place.exists():
            train_gate(
                lab.base, lab.pool[name], lab.task(IN_POOL, name), config, work_folder=f"{place}.work"
            ).save(place)
        retrained.append(Expert.load(place))
    found: dict[str, Any] = {}
    pools = {"recipe's": Pool([lab.pool[n] for n in names]), f"{PAPERS_STEPS} steps": Pool(retrained)}
    for kind, pool in pools.items():
        route(lab.base, pool, PHATGOOSE())
        try:
            found[kind] = {
                n: {
                    "score": evaluate(
                        lab.base, lab.task(IN_POOL, n), split="validation", limit=LONGER_ROWS
                    ).mean,
                    "own share": _shares(lab, n)["prompt"][n],
                }
                for n in track(names, kind, console=console)
            }
        finally:
            unroute(lab.base)
        console.print(kind, found[kind])
    return found


def answers(lab: WorkerState, console: Console, names: list[str]) -> dict[str, Any]:
    """By task and system, on the rows that were measured: the score, how much longer than a row's mean choice
    the chosen one is (in tokens), and how often each place among the choices is taken."""
    found: dict[str, Any] = {}
    for name in names:
        suite, _, task_name = name.partition("/")
        task = lab.task(suite, task_name)
        rows = task.test[: lab.recipe.measure.test_rows]
        if any(row.choices is None for row in rows):
            raise SystemExit(f"{name} has rows without choices.")
        places = [row.choices.index(row.targets[0]) for row in rows if row.choices]
        found[name] = {"right": _taken(lab, rows, places) | {"the longest scores": _longest(lab, rows)}}
        singles = {f"single:{n}": (Pool([lab.pool[n]]), Single(0)) for n in lab.pool.names}
        systems = {s: lab.system(s, None) for s in ("base", *ANSWERED)} | singles
        for system, (pool, router) in track(systems.items(), name, console=console):
            if pool is not None:
                route(lab.base, pool, router)
            try:
                score = evaluate(lab.base, task, split="test", limit=len(rows))
            finally:
                unroute(lab.base)
            places = [
                max(range(len(s)), key=s.__getitem__)
                for p in score[task.name].predictions
                if (s := p.choice_scores)
            ]
            found[name][system] = {"score": score.mean} | _taken(lab, rows, places)
        console.print(name, found[name])
    return found


def _lengths(lab: WorkerState, rows: Sequence[Example]) -> list[list[int]]:
    """Of every row's choices, in tokens."""
    return [
        [len(lab.base.tokenizer(c, add_special_tokens=False).input_ids) for c in row.choices or ()]
        for row in rows
    ]


def _longest(lab: WorkerState, rows: Sequence[Example]) -> float:
    """The score of always choosing the longest choice; of equal ones by chance."""
    hits = []
    for row, tokens in zip(rows, _lengths(lab, rows), strict=True):
        longest = [c for c, n in zip(row.choices or (), tokens, strict=True) if n == max(tokens)]
        hits.append(sum(c in row.targets for c in longest) / len(longest))
    return sum(hits) / len(hits)


def _taken(lab: WorkerState, rows: Sequence[Example], places: Sequence[int]) -> dict[str, Any]:
    """Statistics of the choices at these places, one a row."""
    tokens = _lengths(lab, rows)
    ratios = [t[p] / (sum(t) / len(t)) for t, p in zip(tokens, places, strict=True)]
    shares = [places.count(n) / len(places) for n in range(max(map(len, tokens)))]
    shortest = [t[p] == min(t) for t, p in zip(tokens, places, strict=True)]
    return {
        "length of the mean choice's": round(sum(ratios) / len(ratios), 3),
        "shortest": round(sum(shortest) / len(rows), 3),
        "places": [round(s, 3) for s in shares],
    }


def gates(lab: WorkerState, console: Console) -> dict[str, Any]:
    """Each expert's mean ‖v‖ over modules; the mean and largest cosine of two experts' gates, means over modules."""
    experts = [e for e in lab.pool.experts if e.gates is not None]
    paths = list(experts[0].gates or {})
    stacked = torch.stack(
        [torch.stack([(e.gates or {})[p].double() for p in paths]) for e in experts]
    )  # [E, M, d]
    norms = stacked.norm(dim=-1)
    unit = stacked / norms[..., None]
    cosines = torch.einsum("emd,fmd->ef", unit, unit) / len(paths)
    pairs = cosines[~torch.eye(len(experts), dtype=torch.bool)]
    place = int((cosines - 2 * torch.eye(len(experts))).argmax())
    found = {
        "norms": {e.name: float(n) for e, n in zip(experts, norms.mean(1), strict=True)},
        "mean_cosine": float(pairs.mean()),
        "nearest": {
            "pair": [experts[place // len(experts)].name, experts[place % len(experts)].name],
            "cosine": float(cosines.flatten()[place]),
        },
    }
    console.print(found)
    return found


def tasks(lab: WorkerState) -> list[str]:
    return [e.name for e in lab.suites[IN_POOL].entries if e.name in lab.pool.names]


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("what", choices=["shares", "drop", "longer", "gates", "answers"])
    parser.add_argument(
        "tasks", nargs="*", help="of drop and longer (all, if none is given), of answers as SUITE/TASK"
    )
    options = parser.parse_args()
    recipe = ExperimentRecipe.from_json(json.loads((options.experiment / "recipe.json").read_text()))
    lab, console = WorkerState(recipe, options.experiment), Console()
    if options.what != "answers" and IN_POOL not in lab.suites:
        raise SystemExit(f"{options.experiment} has no suite {IN_POOL}, whose tasks are looked at.")
    if options.what in ("shares", "longer") and lab.base.is_encoder_decoder:
        raise SystemExit("shares are counted with a key-value cache, so only for decoder-only bases.")
    if options.what == "answers" and (
        wrong := [t for t in options.tasks if t.partition("/")[0] not in lab.suites] or not options.tasks
    ):
        raise SystemExit(
            f"answers: name tasks as SUITE/TASK, SUITE being one of {', '.join(lab.suites)}; got {wrong or 'none'}."
        )
    if options.what == "answers":
        found = answers(lab, console, options.tasks)
    elif options.what in ("drop", "longer"):
        found = {"drop": drop, "longer": longer}[options.what](lab, console, options.tasks or tasks(lab))
    else:
        found = {"shares": shares, "gates": gates}[options.what](lab, console)
    rows = {"shares": SHARE_ROWS, "drop": DROP_ROWS, "longer": LONGER_ROWS}.get(options.what)
    data = {
        "format": "phatgoose-surprises",
        "version": 1,
        "made": made(0.0),
        "rows": rows,
        options.what: found,
    }
    write_json(options.experiment / f"surprises-{options.what}.json", data)


if __name__ == "__main__":
    main()
