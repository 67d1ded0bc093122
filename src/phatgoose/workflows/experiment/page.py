"""An experiment's results as the page takes them (`analysis.checks.SHAPE`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from phatgoose.routers.parse import MERGES, is_control
from phatgoose.workflows.experiment.recipe import IN_POOL
from phatgoose.workflows.experiment.systems import (
    BASE,
    BEST_SINGLE,
    MAIN,
    MULTITASK,
    ORACLE,
    OTHER,
    OWN,
    PADDED,
    SISTER,
)

FORMAT = "phatgoose-experiment"
EXPERT = (
    "name", "task", "spec", "rows", "rank", "parameters", "steps", "gate_steps", "expert_seconds", "gate_seconds",
    "gate_token_share", "kind", "base_model", "modules", "made", "health", "nearest",
)  # fmt: skip
"""What the page shows of an expert: what it cost, and its card if the pool was traced."""
NOTES = [
    "Means are over the tasks that every system was measured on; scores of other tasks stand beside them.",
    "Intervals are 95 % by bootstrap over rows, differences are paired by row. With many systems some differences look "
    "real by chance: results.md has p-values adjusted for that.",
    "Oracle and best-single choose their experts by labels of a few validation rows, which no router has.",
]
SYSTEM_NOTES = {
    BASE: "the base model alone",
    "single": "this expert on every token",
    "merged": "one expert: the average of all updates",
    "uniform": "all experts on every token, equal weights: the same function as merged",
    "random": "random experts for every token and module",
    MAIN: "experts chosen by their gates for every token and module",
    ORACLE: "per task, the single expert that is best on its validation rows",
}


def page_data(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json of an experiment → what `report` takes: suites are groups of tasks."""
    suites = results["suites"]
    names = page_names({suite: found["tasks"] for suite, found in suites.items()})
    order = dict.fromkeys(system for found in suites.values() for system in found["systems"])
    systems = sorted(order, key=lambda system: system != MAIN)  # the page is about the first router
    traced = {key: results[key] for key in ("shares", "layers") if key in results}
    claims = [claim_text(suite, claim) for suite, claim in results.get("claims", {}).items()]
    return {
        "title": f"Experiment on {results['recipe']['base']}",
        "made": results["made"],
        "base": {"spec": results["recipe"]["base"]},
        "recipe": results["recipe"],
        "experts": [_expert(e, suites.get(IN_POOL, {}).get("systems", {})) for e in results["experts"]],
        "tasks": [
            {
                "name": name, "group": suite, "spec": suites[suite]["tasks"][task]["spec"],
                **_measured(suites[suite], task),
            }
            for (suite, task), name in names.items()
        ],
        "systems": [_system(system, suites, names) for system in systems],
        "comparisons": [row for suite, found in suites.items() for row in _comparisons(suite, found)],
        "recovered": {
            suite: share
            for suite, found in suites.items() if (share := found["oracle_gain_share"].get(MAIN)) is not None
        },
        **traced,
        "notes": [*NOTES, *claims],
    }  # fmt: skip


def page_names(suites: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], str]:
    """(suite, task) → the task's name on the page, with its suite where two suites have a task of that name."""
    tasks = [(suite, task) for suite, found in suites.items() for task in found]
    several = Counter(task for _, task in tasks)
    return {(suite, task): f"{suite}: {task}" if several[task] > 1 else task for suite, task in tasks}


def claim_text(suite: str, claim: Mapping[str, Any]) -> str:
    """A claim of the recipe, and whether the results bear it out."""
    text = (
        f"Claimed beforehand: on {suite}, PHATGOOSE recovers at least {claim['floor']:.0%} of the oracle's gain "
        "over the base"
    )
    if claim["share"] is None:
        return f"{text}. The oracle gains too little here to say."
    return f"{text}. It recovers {claim['share']:.0%}: the claim {'holds' if claim['holds'] else 'does not hold'}."


def _expert(record: Mapping[str, Any], systems: Mapping[str, Any]) -> dict[str, Any]:
    """An expert's record, with what the base and the expert alone score on its own task, where both were measured."""
    found = {key: record[key] for key in EXPERT if record.get(key) is not None}
    name = record["name"]
    alone = next((s for s in (f"single:{name}", OWN) if name in systems.get(s, {}).get("tasks", {})), None)
    if alone and name in systems.get(BASE, {}).get("tasks", {}):
        found |= {key: systems[s]["tasks"][name]["mean"] for key, s in (("base", BASE), ("own", alone))}
    return found


def _measured(suite: Mapping[str, Any], task: str) -> dict[str, Any]:
    scores = [s["tasks"][task] for s in suite["systems"].values() if task in s["tasks"]]
    return {"metric": scores[0]["metric"], "rows": scores[0]["rows"]} if scores else {}


def _system(system: str, suites: Mapping[str, Any], names: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    found = {suite: s["systems"][system] for suite, s in suites.items() if system in s["systems"]}
    return {
        "name": system,
        "kind": kind_of(system),
        **({"note": SYSTEM_NOTES[kind]} if (kind := system.partition(":")[0]) in SYSTEM_NOTES else {}),
        "scores": {
            names[suite, task]: {key: score[key] for key in ("mean", "low", "high", "rows")}
            for suite, mine in found.items()
            for task, score in mine["tasks"].items()
        },
        "groups": {
            suite: {key: mine[key] for key in ("mean", "low", "high")}
            for suite, mine in found.items() if "mean" in mine
        },
    }  # fmt: skip


def kind_of(system: str) -> str:
    """What the page calls a system."""
    kind = system.partition(":")[0]
    if kind in (BASE, ORACLE):
        return kind
    if kind in (BEST_SINGLE, OWN, SISTER, "single"):
        return "single"
    if kind in (*MERGES, MULTITASK, OTHER):
        return "static"
    return "control" if kind == PADDED or is_control(kind) else "router"


def _comparisons(suite: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """PHATGOOSE minus every other system; without PHATGOOSE, every system minus the base."""
    against = found["against"]
    if MAIN in against:
        # Results hold other − PHATGOOSE; the page shows PHATGOOSE − other, so the interval's ends swap.
        rows = [(MAIN, other, -d["difference"], -d["high"], -d["low"]) for other, d in against[MAIN].items()]
    else:
        rows = [(s, BASE, d["difference"], d["low"], d["high"]) for s, d in against.get(BASE, {}).items()]
    names = ("group", "a", "b", "difference", "low", "high")
    return [dict(zip(names, (suite, *row), strict=True)) for row in rows]
