"""What an experiment compares: the base, routers, merged experts, choices that need labels, controls. Names → (pool, router).

Any router's command-line form is a system ("phatgoose:top_k=1", "arrow"), with {seed} filled in where it has one. Beside those:

    base          the base alone                          merged, ties, dare   one expert made of all
    best-single   one expert for a whole suite            oracle               one expert for each task
    own           each task's own expert, in-pool only
    multitask     one expert trained on all the pool's data together: what pooling the data would give
    padded:N      PHATGOOSE, N experts that know nothing among the pool's
    model:SPEC    another model by itself on the same rows, such as a released multitask one (model:google/flan-t5-xl)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.merge import dare, merged, ties
from phatgoose.experts.padding import padded
from phatgoose.experts.pool import Pool
from phatgoose.registry import unknown
from phatgoose.routers import PHATGOOSE, ROUTERS, Router, Single, parse_router

BASE, MAIN = "base", "phatgoose"
MULTITASK, OTHER = "multitask", "model"
BEST_SINGLE, ORACLE, OWN = "best-single", "oracle", "own"
CHOSEN = (BEST_SINGLE, ORACLE)
"""Systems that choose an expert by labels, on validation rows: no router has that."""
TOLD = (*CHOSEN, OWN)
"""Systems that are told which expert acts: those, and the one that knows the task's name."""
STATIC: dict[str, Callable[[Pool], Expert]] = {"merged": merged, "ties": ties, "dare": dare}


def expanded(systems: Sequence[str], seeds: Sequence[int]) -> tuple[str, ...]:
    """Every system once for each seed, if it has one."""
    found = [
        s.replace("{seed}", str(seed)) for s in systems for seed in (seeds if "{seed}" in s else (None,))
    ]
    return tuple(dict.fromkeys(found))


def check_system(name: str) -> None:
    """Refuses a name that means nothing.

    Raises:
        UnknownName: there is no such system or router. RoutingError: a setting is wrong.
    """
    kind, _, rest = name.partition(":")
    if name in (BASE, MULTITASK, *TOLD, *STATIC):
        return
    if kind == OTHER:
        if not rest.strip():
            raise RoutingError(
                f"system {name!r} should read model:SPEC, SPEC being a model as `--base` takes it."
            )
        return
    if kind == "padded":
        if not (rest.isascii() and rest.isdigit()) or int(rest) < 1:
            raise RoutingError(f"system {name!r} should read padded:N, N being how many experts are added.")
        return
    if kind not in ROUTERS:
        raise unknown("system", name, (BASE, MULTITASK, *TOLD, *STATIC, "padded", OTHER, *ROUTERS))
    parse_router(name)


def reads(name: str) -> str:
    """What of the experts' data signatures a system needs: "activations", "texts", or nothing."""
    return parse_router(name).reads if name.partition(":")[0] in ROUTERS else ""


def build(name: str, pool: Pool, expert: str | None = None) -> tuple[Pool | None, Router | None]:
    """(pool, router) to attach for a system; (None, None) is the base. `expert` is the one that acts, for a system of `TOLD`.

    Raises:
        PoolError, RoutingError: this pool can't be merged or routed so.
    """
    kind, _, rest = name.partition(":")
    if name == BASE:
        return None, None
    if name in TOLD:
        if expert is None:
            raise RoutingError(f"{name} needs the expert that acts.")
        return Pool([pool[expert]]), Single(0)
    if name in STATIC:
        return Pool([STATIC[name](pool)]), Single(0)
    if kind == "padded":
        return padded(pool, int(rest)), PHATGOOSE()
    router = parse_router(name)
    router.check(pool.names)
    return pool, router
