"""How often a named sister acts, and how often an expert of the right domain with the wrong skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phatgoose.workflows.experiment.systems import BEST_SINGLE, MAIN, ORACLE

KINDS = {"skill": "sisters", "domain": "same_domain"}
"""What is hit → where a task says which experts that are."""
CHANCE = "chance"


def hits(
    tasks: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, Mapping[str, str | None]],
    shares: Mapping[str, Mapping[str, float]],
    pool: Sequence[str],
) -> dict[str, dict[str, float]]:
    """System → {"tasks", "skill", "domain"}: shares in [0, 1], means over the tasks that name sisters.

    Of oracle and best-single, of tasks whose expert is one of these. Of PHATGOOSE, of the routing weight on the prompts
    that were traced. "chance" is what an expert at random hits. Other routers' choices aren't kept with their scores.

    Args:
        chosen: system → task → the expert that acts.
        shares: task → expert → its share of PHATGOOSE's routing weight; empty if nothing was traced.
        pool: all experts.
    """
    acting: dict[str, dict[str, Mapping[str, float]]] = {
        system: {t: {e: 1.0} for t, e in chosen.get(system, {}).items() if e is not None}
        for system in (ORACLE, BEST_SINGLE)
    }
    acting[MAIN] = dict(shares)
    acting[CHANCE] = {task: dict.fromkeys(pool, 1 / len(pool)) for task in tasks}
    found = {}
    for system, weights in acting.items():
        asked = [t for t, info in tasks.items() if info.get("sisters") and t in weights]
        if asked:
            found[system] = {"tasks": len(asked)} | {
                kind: sum(weights[t].get(e, 0.0) for t in asked for e in tasks[t][key]) / len(asked)
                for kind, key in KINDS.items()
            }
    return found if found.keys() - {CHANCE} else {}


def hit_table(found: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The same in rows, the first of them the head."""
    return [
        ["", "tasks", "a named sister", "same domain, other skill"],
        *([s, f"{one['tasks']}", f"{one['skill']:.0%}", f"{one['domain']:.0%}"] for s, one in found.items()),
    ]
