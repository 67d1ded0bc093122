"""What an experiment compares: system names → (pool, router), and which experts labels choose.

Any router's command-line form is a system ("phatgoose:top_k=1", "arrow"); {seed} in it is replaced by each seed.
Further systems:

    base          the base alone
    merged        one expert made of all; so do ties[:density=X] and dare[:density=X,seed=N]
    best-single   one expert for a whole suite            oracle               one expert for each task
    own           each task's own expert: in-pool, and on a suite's tasks with a tier that of [measure] own_experts
    sister        the best of the experts that a suite names beforehand for each task; the base, where it names none
    multitask     one expert trained on all the pool's data together: what pooling the data would give
    padded:N      PHATGOOSE with N experts added that know nothing (padded:N,seed=M: others)
    model:SPEC    another model by itself on the same rows, such as a released multitask one (model:google/flan-t5-xl)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from phatgoose.errors import PoolError, RoutingError, brief
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.records import Example, TaskScore
from phatgoose.routers import PHATGOOSE, Router, Single
from phatgoose.routers.parse import BASE as BASE
from phatgoose.routers.parse import LABELLED, parse_pool_settings, parse_system

MAIN = "phatgoose"
MULTITASK, OTHER, PADDED = "multitask", "model", "padded"
BEST_SINGLE, ORACLE, SISTER, OWN = "best-single", "oracle", "sister", "own"
CHOSEN = (BEST_SINGLE, ORACLE, SISTER)
"""Systems that choose an expert by labels of validation rows, which no router has."""
TOLD = (*CHOSEN, OWN)
"""Systems that are told which expert acts: those above, and the one that knows the task's name."""


def expanded(systems: Sequence[str], seeds: Sequence[int]) -> tuple[str, ...]:
    """Every system, once for each seed if it has {seed}; its name in lower case, as on the command line."""
    found = [
        s.replace("{seed}", str(seed)) for s in systems for seed in (seeds if "{seed}" in s else (None,))
    ]
    parts = [s.partition(":") for s in found]
    return tuple(dict.fromkeys(f"{kind.lower()}{colon}{rest}" for kind, colon, rest in parts))


def check_system(name: str) -> None:
    """Refuses a name that is no system.

    Raises:
        UnknownName: there is no such system or router. RoutingError: a setting is wrong.
    """
    kind, colon, rest = name.partition(":")
    if kind in (MULTITASK, *TOLD):
        if colon:
            raise RoutingError(f"{brief(name)}: {kind} has no settings.")
    elif kind == OTHER:
        if not rest.strip():
            raise RoutingError(
                f"system {name!r} should read model:SPEC, SPEC being a model as `--base` takes it."
            )
    elif kind == PADDED:
        _padding(name)
    else:
        parse_system(name, (*LABELLED, SISTER))


def _padding(name: str) -> tuple[int, dict[str, Any]]:
    """(how many experts are added, settings) of padded:N[,seed=M]."""
    number, comma, rest = name.partition(":")[2].partition(",")
    if not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise RoutingError(f"system {name!r} should read padded:N, N being how many experts are added.")
    return int(number), parse_pool_settings(name, padded, rest if comma else None)


def build(name: str, pool: Pool, expert: str | None = None) -> tuple[Pool | None, Router | None]:
    """(pool, router) to attach for a system; (None, None) for the base.

    Args:
        expert: the one that acts, for a system of `TOLD`. None: for `sister`, the base.

    Raises:
        PoolError, RoutingError: this pool can't be merged or routed so.
    """
    if name in TOLD:
        if expert is None and name == SISTER:
            return None, None
        if expert is None:
            raise RoutingError(f"{name} needs the expert that acts.")
        return Pool([pool[expert]]), Single(0)
    if name.partition(":")[0] == PADDED:
        count, settings = _padding(name)
        return padded(pool, count, **settings), PHATGOOSE()
    attached, router = parse_system(name).on(pool)
    if isinstance(router, Single) and attached is pool:
        # The expert alone, so that oracle, own and single:NAME share its scores.
        return Pool([pool.experts[router.place(pool.names)]]), Single(0)
    return attached, router


def padded(pool: Pool, count: int, seed: int = 0) -> Pool:
    """The pool with `count` random experts after its own.

    Each is modelled on one of the pool's experts in turn: every tensor and every gate is drawn from a normal
    distribution with the mean and standard deviation of the original, so that its size doesn't give it away.

    Raises:
        PoolError: `count` is negative, or a name it would use is taken.
    """
    if count < 0:
        raise PoolError(f"{count} experts can't be added to a pool.")
    generator = torch.Generator().manual_seed(seed)

    def random_like(tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.float()
        draw = torch.randn(tensor.shape, generator=generator)
        return (values.mean() + values.std(correction=0) * draw).to(tensor.dtype)

    added = []
    for number in range(count):
        model = pool.experts[number % len(pool.experts)]
        provenance = {"kind": "random", "like": model.name, "seed": seed}
        if model.base is not None:
            provenance["base"] = model.base.to_json()
        gates = (
            None if model.gates is None else {path: random_like(gate) for path, gate in model.gates.items()}
        )
        tensors = {key: random_like(tensor) for key, tensor in model.tensors.items()}
        added.append(Expert(f"random-{number + 1}", model.adapter_config, tensors, gates, provenance))
    return Pool([*pool.experts, *added])


Standing = Sequence[float | None]
"""(mean score on a task's validation rows, mean log-likelihood per token of right choices; None if no row has
choices)."""


def standing(score: TaskScore, rows: Sequence[Example]) -> list[float | None]:
    """What an expert is chosen by on one task, from its score on these rows."""
    found = [
        max(s for choice, s in zip(row.choices, made.choice_scores, strict=True) if choice in row.targets)
        for row, made in zip(rows, score.predictions, strict=True)
        if row.choices is not None and made.choice_scores is not None
    ]
    return [score.mean, sum(found) / len(found) if found else None]


def best(scores: Mapping[str, Sequence[Standing]]) -> str:
    """The expert that is best over some tasks, from expert → its standing on each of them."""
    return max(scores, key=lambda expert: rank(scores[expert]))


def rank(standings: Sequence[Standing]) -> tuple[float, float]:
    """Sorts experts, the best last. Rounded, so that the order of summing doesn't tip a tie.

    By few rows many experts tie: then the one wins under which right choices are likelier, or the first of the pool.
    """
    return round(sum(mean or 0.0 for mean, _ in standings), 9), sum(likely or 0.0 for _, likely in standings)


def picks(
    scores: Mapping[str, Mapping[str, Standing]],
    names: Sequence[str],
    tasks: Sequence[str],
    sisters: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[str, str | None]]:
    """System → task → expert, from expert → task → its standing there.

    A task on which no expert could be scored has no oracle. An expert that couldn't be scored where others were
    can't be best-single. Where some task names sisters, those that name none have the sister None: the base alone.

    Args:
        names: the tasks that can be chosen on.
        tasks: all of the suite.
        sisters: the experts that each task names.
    """
    oracle: dict[str, str | None] = {}
    named = sisters or {}
    sister: dict[str, str | None] = {t: None for t in tasks if any(named.values()) and not named.get(t)}
    for task in names:
        if able := {e: [scores[e][task]] for e in scores if task in scores[e]}:
            oracle[task] = best(able)
        if able := {e: standings for e, standings in able.items() if e in named.get(task, ())}:
            sister[task] = best(able)
    # An expert scored on fewer tasks has a smaller sum for that reason alone, so only complete ones are compared.
    most = max((len(found) for found in scores.values()), default=0)
    if not most:
        return {ORACLE: oracle, SISTER: sister, BEST_SINGLE: {}}
    whole = [e for e in scores if len(scores[e]) == most]
    common = [t for t in names if all(t in scores[e] for e in whole)]
    one = best({e: [scores[e][t] for t in common] for e in whole})
    return {ORACLE: oracle, SISTER: sister, BEST_SINGLE: dict.fromkeys(tasks, one)}
