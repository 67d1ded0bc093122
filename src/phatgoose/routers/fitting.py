"""Which router routes a pool when the user names none: by the published scores, the best that can."""

from __future__ import annotations

from dataclasses import dataclass

from phatgoose.errors import RoutingError
from phatgoose.experts.health import few
from phatgoose.experts.weight_signature import why_no_signature
from phatgoose.routers.gander import Gander, Reading
from phatgoose.routers.router import Setup

WITHOUT_POOL = "gander"
"""The router of a server that has no experts yet."""


@dataclass(frozen=True)
class Obstacles:
    """Why some routers can't be used where a pool is to be routed; "" where they can."""

    sequences: str = ""
    """For routers that remember what each sequence has read."""
    other_than_gates: str = ""
    """For routers that choose by anything but gates."""


@dataclass(frozen=True)
class Fit:
    """The router for a pool, as the command line writes it, and why it is this one, for people."""

    text: str
    why: str
    lacking: tuple[str, ...] = ()
    """Experts that keep Gander away: without gates and without weights that it could read."""


def fitting_router(setup: Setup, obstacles: Obstacles | None = None) -> Fit:
    """The first of these that can serve all experts, in the order of docs/results.md ("Gander").

    "gander"; "lag" if every update has singular vectors; "phatgoose" if every expert has gates;
    "phatgoose:ungated=weights" if the others' updates have singular vectors; else "uniform".
    """
    obstacles = obstacles or Obstacles()
    why_not = obstacles.other_than_gates or obstacles.sequences or _why_no_gander(setup)
    if not why_not:
        return Fit("gander", "of the routers that need no data, the one with the highest published scores")
    instead = f"gander can't be used: {why_not}"
    unread = [e.name for e in setup.experts if any(map(why_no_signature, e.updates.values()))]
    ungated = [e.name for e in setup.experts if e.gates is None]
    if not unread and not obstacles.other_than_gates:
        return Fit("lag", instead)
    if not ungated:
        return Fit("phatgoose", instead)
    if lost := [name for name in ungated if name in unread]:
        why = f"{_named(lost)} neither gates nor weights that a router could use"
        return Fit("uniform", why, () if obstacles.sequences or obstacles.other_than_gates else tuple(lost))
    if len(ungated) < len(setup.experts):
        return Fit("phatgoose:ungated=weights", instead)
    return Fit("weight-only", instead)


def _why_no_gander(setup: Setup) -> str:
    """Why Gander can't route these experts on this model; "" if it can."""
    try:
        reading = Reading.of(Gander(), setup)
    except RoutingError as error:
        return str(error).partition(": ")[0]  # without what it says to do instead
    lost: dict[str, str] = {}
    for path, members in reading.read.items():
        for expert in (setup.experts[member] for member in members):
            if expert.gates is None and (why := why_no_signature(expert.updates[path])) is not None:
                lost[expert.name] = why
    return f"{_named(list(lost))} neither gates nor singular vectors" if lost else ""


def _named(names: list[str]) -> str:
    """ "a, b and 3 more have", "a has"."""
    return f"{few(names, 5)} {'has' if len(names) == 1 else 'have'}"
