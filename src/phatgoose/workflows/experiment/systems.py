"""What an experiment compares: the base, routers, merged experts, choices that need labels, controls. Names → (pool, router).

Any router's command-line form is a system ("phatgoose:top_k=1", "arrow"), with {seed} filled in where it has one. Beside those:

    base          the base alone
    merged        one expert made of all; so do ties[:density=X] and dare[:density=X,seed=N]
    best-single   one expert for a whole suite            oracle               one expert for each task
    own           each task's own expert, in-pool only
    multitask     one expert trained on all the pool's data together: what pooling the data would give
    padded:N      PHATGOOSE, N experts that know nothing among the pool's (padded:N,seed=M: others)
    model:SPEC    another model by itself on the same rows, such as a released multitask one (model:google/flan-t5-xl)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
STATIC: dict[str, Callable[..., Expert]] = {"merged": merged, "ties": ties, "dare": dare}
_SETTINGS: dict[str, dict[str, Callable[[str], Any]]] = {
    "ties": {"density": float},
    "dare": {"density": float, "seed": int},
    "padded": {"seed": int},
}


def expanded(systems: Sequence[str], seeds: Sequence[int]) -> tuple[str, ...]:
    """Every system once for each seed, if it has one; what it is in small letters, as on the command line."""
    found = [
        s.replace("{seed}", str(seed)) for s in systems for seed in (seeds if "{seed}" in s else (None,))
    ]
    parts = [s.partition(":") for s in found]
    return tuple(dict.fromkeys(f"{kind.lower()}{colon}{rest}" for kind, colon, rest in parts))


def check_system(name: str) -> None:
    """Refuses a name that means nothing.

    Raises:
        UnknownName: there is no such system or router. RoutingError: a setting is wrong.
    """
    kind, _, rest = name.partition(":")
    if name in (BASE, MULTITASK, *TOLD):
        return
    if kind in STATIC:
        _settings(name, rest)
        return
    if kind == OTHER:
        if not rest.strip():
            raise RoutingError(
                f"system {name!r} should read model:SPEC, SPEC being a model as `--base` takes it."
            )
        return
    if kind == "padded":
        _padding(name)
        return
    if kind not in ROUTERS:
        raise unknown("system", name, (BASE, MULTITASK, *TOLD, *STATIC, "padded", OTHER, *ROUTERS))
    parse_router(name)


def _settings(name: str, text: str) -> dict[str, Any]:
    """key=value,… of a system that is no router."""
    kind = name.partition(":")[0]
    known, found = _SETTINGS.get(kind, {}), {}
    if not text and ":" in name and kind in STATIC:
        raise RoutingError(f"system {name!r}: there are no settings after the colon.")
    for part in text.split(",") if text else ():
        key, _, value = part.partition("=")
        if key in found:
            raise RoutingError(f"system {name!r}: {key} is given twice.")
        if key not in known:
            raise RoutingError(
                f"system {name!r}: {kind} has no setting {key!r}; it has: {', '.join(known) or 'none'}."
            )
        try:
            found[key] = known[key](value)
        except ValueError:
            raise RoutingError(f"system {name!r}: {key} is {value!r}, expected a number.") from None
    if not 0 < found.get("density", 1.0) <= 1:
        raise RoutingError(f"system {name!r}: density is a share, expected above 0 and at most 1.")
    if not 0 <= found.get("seed", 0) < 2**63:
        raise RoutingError(f"system {name!r}: expected a seed of at least 0 and below 2**63.")
    return found


def _padding(name: str) -> tuple[int, dict[str, Any]]:
    """(how many experts are added, settings) of padded:N[,seed=M]."""
    number, _, rest = name.partition(":")[2].partition(",")
    if not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise RoutingError(f"system {name!r} should read padded:N, N being how many experts are added.")
    return int(number), _settings(name, rest)


def reads(name: str) -> str:
    """What of the experts' data signatures a system needs: "activations", "texts", or nothing."""
    return parse_router(name).reads if name.partition(":")[0] in ROUTERS else ""


def combined(name: str, pool: Pool) -> Pool:
    """The one expert that all of a pool are made into by a system of `STATIC`, with its settings.

    Raises:
        PoolError: these experts can't be merged so.
    """
    kind, _, rest = name.partition(":")
    return Pool([STATIC[kind](pool, **_settings(name, rest))])


def build(name: str, pool: Pool, expert: str | None = None) -> tuple[Pool | None, Router | None]:
    """(pool, router) to attach for a system; (None, None) is the base. `expert` is the one that acts, for a system of `TOLD`.

    Raises:
        PoolError, RoutingError: this pool can't be merged or routed so.
    """
    kind = name.partition(":")[0]
    if name == BASE:
        return None, None
    if name in TOLD:
        if expert is None:
            raise RoutingError(f"{name} needs the expert that acts.")
        return Pool([pool[expert]]), Single(0)
    if kind in STATIC:
        return combined(name, pool), Single(0)
    if kind == "padded":
        count, settings = _padding(name)
        return padded(pool, count, **settings), PHATGOOSE()
    router = parse_router(name)
    router.check(pool.names)
    return pool, router
