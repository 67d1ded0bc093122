"""What an experiment compares: system names → (pool, router).

Any router's command-line form is a system ("phatgoose:top_k=1", "arrow"); {seed} in it is replaced by each seed.
Further systems:

    base          the base alone
    merged        one expert made of all; so do ties[:density=X] and dare[:density=X,seed=N]
    best-single   one expert for a whole suite            oracle               one expert for each task
    own           each task's own expert, in-pool only
    multitask     one expert trained on all the pool's data together: what pooling the data would give
    padded:N      PHATGOOSE with N experts added that know nothing (padded:N,seed=M: others)
    model:SPEC    another model by itself on the same rows, such as a released multitask one (model:google/flan-t5-xl)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phatgoose.errors import RoutingError, brief
from phatgoose.experts.pool import Pool
from phatgoose.routers import PHATGOOSE, Router, Single
from phatgoose.routers.parse import BASE as BASE
from phatgoose.routers.parse import LABELLED, is_router, parse_pool_settings, parse_router, parse_system
from phatgoose.workflows.padding import padded

MAIN = "phatgoose"
MULTITASK, OTHER, PADDED = "multitask", "model", "padded"
BEST_SINGLE, ORACLE, OWN = "best-single", "oracle", "own"
CHOSEN = (BEST_SINGLE, ORACLE)
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
        parse_system(name, LABELLED)


def _padding(name: str) -> tuple[int, dict[str, Any]]:
    """(how many experts are added, settings) of padded:N[,seed=M]."""
    number, _, rest = name.partition(":")[2].partition(",")
    if not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise RoutingError(f"system {name!r} should read padded:N, N being how many experts are added.")
    return int(number), parse_pool_settings(name, padded, rest)


def reads(name: str) -> str:
    """The part of data signatures that a system reads: "activations", "texts", or "" for none."""
    return parse_router(name).reads if is_router(name) else ""


def build(name: str, pool: Pool, expert: str | None = None) -> tuple[Pool | None, Router | None]:
    """(pool, router) to attach for a system; (None, None) for the base.

    Args:
        expert: the one that acts, for a system of `TOLD`.

    Raises:
        PoolError, RoutingError: this pool can't be merged or routed so.
    """
    if name in TOLD:
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
