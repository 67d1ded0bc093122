"""Who scores: from a module's input, which experts act on each token and how much."""

from __future__ import annotations

from phatgoose.errors import RoutingError, brief
from phatgoose.registry import lookup
from phatgoose.routers.constant import Random, Single, Uniform, Written
from phatgoose.routers.controls import FixedRandom, ShuffledGates
from phatgoose.routers.example import Centroid, Retrieval, SoftCentroid
from phatgoose.routers.router import Router
from phatgoose.routers.token import PHATGOOSE, AverageActivation
from phatgoose.routers.weights import LAG, Arrow, SpectR, WeightOnly

ROUTERS = {
    "arrow": "phatgoose.routers.weights:Arrow",
    "average-activation": "phatgoose.routers.token:AverageActivation",
    "centroid": "phatgoose.routers.example:Centroid",
    "fixed-random": "phatgoose.routers.controls:FixedRandom",
    "lag": "phatgoose.routers.weights:LAG",
    "phatgoose": "phatgoose.routers.token:PHATGOOSE",
    "random": "phatgoose.routers.constant:Random",
    "retrieval": "phatgoose.routers.example:Retrieval",
    "shuffled-gates": "phatgoose.routers.controls:ShuffledGates",
    "single": "phatgoose.routers.constant:Single",
    "soft-centroid": "phatgoose.routers.example:SoftCentroid",
    "spectr": "phatgoose.routers.weights:SpectR",
    "uniform": "phatgoose.routers.constant:Uniform",
    "weight-only": "phatgoose.routers.weights:WeightOnly",
}
LARGEST = 2**31 - 1
"""What a setting may be at most, but for seeds: kernels and tensors hold these numbers."""


def parse_router(text: str) -> Router:
    """A router from its command-line form: "phatgoose", "phatgoose:top_k=3,ungated=weights", "single:NAME", "random:seed=1".

    "single:7" is the expert named 7, or where there is none the one at place 7, counted from 0.

    Raises:
        UnknownName: for an unknown router. RoutingError: for an unknown or malformed setting.
    """
    name, _, rest = text.partition(":")
    kind = lookup("router", name.lower(), ROUTERS)
    if kind is Single:
        # "007" is a name alone: as a place it would be recorded as that of "single:7".
        place = rest.isascii() and rest.isdigit() and len(rest) < 10 and str(int(rest)) == rest
        return Single(Written(rest) if place else rest)
    settings: dict[str, int | str] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in kind.__dataclass_fields__:
            raise RoutingError(
                f"router {name!r} has no setting {key!r}; it has: {', '.join(kind.__dataclass_fields__) or 'none'}."
            )
        if isinstance(kind.__dataclass_fields__[key].default, str):
            settings[key] = value  # the router itself checks it
            continue
        try:
            settings[key] = int(value)
        except ValueError:
            raise RoutingError(
                f"setting {key!r} of router {name!r} is {brief(value)}, expected a whole number."
            ) from None
        if key != "seed" and int(value) > LARGEST:
            raise RoutingError(
                f"setting {key!r} of router {name!r} is {brief(value, 30)}, expected at most {LARGEST}."
            )
    return kind(**settings)


__all__ = [
    "LAG",
    "PHATGOOSE",
    "ROUTERS",
    "Arrow",
    "AverageActivation",
    "Centroid",
    "FixedRandom",
    "Random",
    "Retrieval",
    "Router",
    "ShuffledGates",
    "Single",
    "SoftCentroid",
    "SpectR",
    "Uniform",
    "WeightOnly",
    "parse_router",
]
