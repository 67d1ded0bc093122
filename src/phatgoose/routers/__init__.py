"""Who scores: from a module's input, which experts act on each token and how much.

In: the experts' gates, weights or data signatures, and a module's inputs. Out: for each token chosen experts
and their weights. A new router is a class in a file here, its line in `ROUTERS` of `parse.py`, and its name in
both lists below. Other packages add theirs by an entry point (docs/extending.md). Names here are imported on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phatgoose.routers.parse import ROUTERS, parse_router, parse_system

if TYPE_CHECKING:
    from phatgoose.routers.constant import FixedRandom, Random, Single, Uniform
    from phatgoose.routers.example import Centroid, Retrieval, SoftCentroid
    from phatgoose.routers.gander import Gander
    from phatgoose.routers.router import Router
    from phatgoose.routers.token import PHATGOOSE, AverageActivation, ShuffledGates
    from phatgoose.routers.weights import LAG, Arrow, SpectR, WeightOnly
else:

    def __getattr__(name):
        where = {path.partition(":")[2]: path.partition(":")[0] for path in ROUTERS.table.values()}
        where["Router"] = "phatgoose.routers.router"
        if name not in where:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(where[name]), name)


__all__ = [
    "LAG",
    "PHATGOOSE",
    "ROUTERS",
    "Arrow",
    "AverageActivation",
    "Centroid",
    "FixedRandom",
    "Gander",
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
    "parse_system",
]
