"""Routers and merges by name, as users write them: `name`, or `name:key=value,…`.

To add a router, write a class that extends `Router` and name it in `ROUTERS`. This file imports no router
until one is asked for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from phatgoose.errors import PluginError, RoutingError, UnknownName, brief
from phatgoose.registry import Registry, lookup, unknown

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.pool import Pool
    from phatgoose.routers.router import Router

BASE = "base"
"""The system that is the base alone."""
MERGES = {
    "merged": "phatgoose.experts.merge:merged",
    "ties": "phatgoose.experts.merge:ties",
    "dare": "phatgoose.experts.merge:dare",
}
"""Systems that are one expert made of all: name → function of a pool."""
LABELLED = ("best-single", "oracle", "own", "multitask", "padded", "model")
"""Systems that only an experiment has (`workflows/experiment/systems.py`)."""
ROUTERS = Registry(
    "router",
    "phatgoose.routers",
    {
        "phatgoose": "phatgoose.routers.token:PHATGOOSE",
        "gander": "phatgoose.routers.gander:Gander",
        "average-activation": "phatgoose.routers.token:AverageActivation",
        "retrieval": "phatgoose.routers.example:Retrieval",
        "centroid": "phatgoose.routers.example:Centroid",
        "soft-centroid": "phatgoose.routers.example:SoftCentroid",
        "arrow": "phatgoose.routers.weights:Arrow",
        "spectr": "phatgoose.routers.weights:SpectR",
        "lag": "phatgoose.routers.weights:LAG",
        "weight-only": "phatgoose.routers.weights:WeightOnly",
        "single": "phatgoose.routers.constant:Single",
        "uniform": "phatgoose.routers.constant:Uniform",
        "random": "phatgoose.routers.constant:Random",
        "fixed-random": "phatgoose.routers.constant:FixedRandom",
        "shuffled-gates": "phatgoose.routers.token:ShuffledGates",
    },
    reserved=(BASE, *MERGES, *LABELLED),
)
LARGEST = 2**31 - 1
"""The largest whole number a setting may have, except for seeds: kernels and tensors hold these numbers."""


@dataclass(frozen=True)
class System:
    """What answers: the base alone, a pool under a router, or the one expert that a pool is merged into."""

    text: str
    """As it was written, the name in small letters."""
    router: Router | None
    """None: the base alone."""
    merge: Callable[[Pool], Expert] | None = None
    """Makes one expert of all, on which `router` then acts."""

    def on(self, pool: Pool) -> tuple[Pool | None, Router | None]:
        """(pool, router) to attach, both None for the base alone.

        Raises PoolError, RoutingError or UnknownName if the experts can't be merged so, or the router can't serve them.
        """
        if self.merge is not None:
            return type(pool)([self.merge(pool)]), self.router
        if self.router is None:
            return None, None
        self.router.check(pool.names)
        return pool, self.router

    def describe(self) -> dict[str, Any]:
        """Name and settings, for results."""
        return self.router.describe() if self.router and not self.merge else {"router": self.text}


def parse_system(text: str, further: Sequence[str] = ()) -> System:
    """What `text` names: "base", a merge ("ties:density=0.3"), or a router.

    Args:
        further: other names that the caller knows, for suggestions.

    Raises:
        UnknownName: there is nothing of this name. RoutingError, PluginError: as `parse_router`.
    """
    name, colon, rest = text.partition(":")
    name = name.lower()
    written = f"{name}{colon}{rest}"
    ROUTERS.check_clash(name)
    if name == BASE:
        if colon:
            raise RoutingError(f"{brief(text)}: {BASE} has no settings.")
        return System(BASE, None)
    if name in MERGES:
        from phatgoose.routers.constant import Single

        merge = lookup("merge", name, MERGES)
        settings = parse_pool_settings(written, merge, rest if colon else None)
        return System(written, Single(0), partial(merge, **settings))
    if not is_router(name):
        raise unknown("router", name, [*ROUTERS, BASE, *MERGES, *further])
    return System(written, parse_router(text))


def is_router(text: str) -> bool:
    """Whether `text` begins with the name of a router."""
    return text.partition(":")[0].lower() in ROUTERS


def is_control(name: str) -> bool:
    """Whether a router, ours or another package's, says that it is a control. False for what isn't there any more."""
    try:
        return router_class(name).control
    except (UnknownName, PluginError):
        return False


def router_class(name: str) -> type[Router]:
    """The class that a name stands for, which says what it needs and which settings it has.

    Raises:
        UnknownName: there is no such router. PluginError: another package's can't be imported, or is no router.
    """
    from phatgoose.routers.router import Router

    found = ROUTERS[name.lower()]
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise PluginError(
            f"the router {name!r} of the package {ROUTERS.package(name.lower())} is {brief(found)}, expected "
            "a class that extends phatgoose.routers.router.Router."
        )
    return found


def parse_router(text: str) -> Router:
    """A router from its command-line form: "phatgoose", "phatgoose:top_k=3,ungated=weights", "single:NAME",
    "random:seed=1".

    "single:7" is the expert named 7, or if there is none the one at index 7, counted from 0.

    Raises:
        UnknownName: for an unknown router. RoutingError: for an unknown or malformed setting.
        PluginError: for a router of another package that can't be used.
    """
    name, colon, rest = text.partition(":")
    kind = router_class(name)
    if (from_text := getattr(kind, "from_text", None)) is not None:
        router: Router = from_text(rest)
        return router
    known = settings_of(kind)
    given = parse_settings(text, known, rest if colon else None)
    if missing := [key for key, (_, default) in known.items() if default is REQUIRED and key not in given]:
        raise RoutingError(f"{brief(text)}: {name.lower()} needs the setting {missing[0]}.")
    return kind(**given)


REQUIRED = inspect.Parameter.empty
"""In place of the default of a setting that has none."""


def settings_of(made: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of a router's class or of a function of a pool: name → (type, default)."""
    hints = get_type_hints(made)
    parameters = inspect.signature(made).parameters.values()
    return {p.name: (hints.get(p.name, str), p.default) for p in parameters}


def parse_settings(text: str, known: Mapping[str, tuple[Any, Any]], rest: str | None) -> dict[str, Any]:
    """The values in `rest` ("key=value,…", or None) as the types in `known` want them. `text` is all, for messages.

    Raises:
        RoutingError: a setting that is empty, isn't known, is given twice, or whose value is of another type.
    """
    found: dict[str, Any] = {}
    for part in [] if rest is None else rest.split(","):
        key, _, value = part.partition("=")
        if not part:
            raise RoutingError(
                f"{brief(text)}: a setting is empty. Write key=value after the colon and after each comma, or "
                "leave the colon or comma out."
            )
        if key not in known:
            name = text.partition(":")[0].lower()
            raise RoutingError(
                f"{brief(text)}: {name} has no setting {brief(key)}; it has: {', '.join(known) or 'none'}."
            )
        if key in found:
            raise RoutingError(f"{brief(text)}: {key} is given twice.")
        try:
            found[key] = _converted(value, known[key][0], LARGEST if key != "seed" else math.inf)
        except ValueError as cause:
            raise RoutingError(f"{brief(text)}: {key} is {brief(value, 30)}, expected {cause}.") from None
    return found


def parse_pool_settings(text: str, function: Callable[..., Any], rest: str | None) -> dict[str, Any]:
    """`parse_settings` for a function of a pool, whose `density` and `seed` have a range."""
    known = {k: v for k, v in settings_of(function).items() if k in ("density", "seed")}
    found = parse_settings(text, known, rest)
    if not 0 < found.get("density", 1.0) <= 1:
        raise RoutingError(f"{brief(text)}: density is a share, expected above 0 and at most 1.")
    if not 0 <= found.get("seed", 0) < 2**63:
        raise RoutingError(f"{brief(text)}: expected a seed of at least 0 and below 2**63.")
    return found


def _converted(value: str, hint: Any, largest: float) -> Any:
    """`value` as the simple type `hint`. Raises ValueError with what is expected instead."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in choices:
            raise ValueError(f"one of: {', '.join(map(str, choices))}")
        return value
    if NoneType in choices:
        (hint,) = [kind for kind in choices if kind is not NoneType]
        return None if value == "none" else _converted(value, hint, largest)
    if hint is str:
        return value
    if hint is bool:
        if value not in ("true", "false"):
            raise ValueError("true or false")
        return value == "true"
    if hint not in (int, float):
        raise ValueError("nothing here: this setting can only be given in Python")
    try:
        number = hint(value)
    except ValueError:
        number = math.nan
    if isinstance(number, float) and not math.isfinite(number):  # a whole number may be too large for a float
        raise ValueError("a whole number" if hint is int else "a number")
    if hint is int and number > largest:
        raise ValueError(f"at most {largest}")
    return number
