"""An experiment's results as the page takes them (`analysis.checks.SHAPE`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phatgoose.errors import EvaluationError
from phatgoose.routers.parse import MERGES
from phatgoose.workflows.experiment.systems import (
    BASE,
    BEST_SINGLE,
    MAIN,
    MULTITASK,
    ORACLE,
    OTHER,
    OWN,
)

FORMAT = "phatgoose-experiment"
CONTROLS = ("uniform", "random", "fixed-random", "shuffled-gates", "padded")
EXPERT = (
    "name", "task", "spec", "rows", "rank", "parameters", "steps", "gate_steps", "expert_seconds", "gate_seconds", "gate_token_share",
)  # fmt: skip
NOTES = [
    "Means are over the tasks that every system was measured on; scores of other tasks stand beside them.",
    "Intervals are 95 % by bootstrap over rows, differences are paired by row. With many systems some differences look real by chance: "
    "results.md has p-values adjusted for that.",
    "Oracle and best-single choose their experts by labels of a few validation rows, which no router has.",
]


def page_data(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json of an experiment → what `report` takes: suites are groups of tasks.

    Raises:
        EvaluationError: it lacks something that an experiment writes.
    """
    try:
        return _page_data(results)
    except (KeyError, TypeError, AttributeError) as cause:
        raise EvaluationError(f"the experiment's results are incomplete or damaged: {cause!r}.") from cause


def _page_data(results: Mapping[str, Any]) -> dict[str, Any]:
    suites = results["suites"]
    names = {(suite, task): task for suite, found in suites.items() for task in found["tasks"]}
    several = [task for task in names.values() if [*names.values()].count(task) > 1]
    names = {key: f"{key[0]}: {task}" if task in several else task for key, task in names.items()}
    order = dict.fromkeys(system for found in suites.values() for system in found["systems"])
    systems = sorted(order, key=lambda system: system != MAIN)  # the page is about the first router
    return {
        "title": f"Experiment on {results['recipe']['base']}",
        "made": results["made"],
        "base": {"spec": results["recipe"]["base"]},
        "recipe": results["recipe"],
        "experts": [{key: e[key] for key in EXPERT if e.get(key) is not None} for e in results["experts"]],
        "tasks": [
            {"name": name, "group": suite, "spec": suites[suite]["tasks"][task]["spec"], **_measured(suites[suite], task)}
            for (suite, task), name in names.items()
        ],
        "systems": [_system(system, suites, names) for system in systems],
        "comparisons": [row for suite, found in suites.items() for row in _comparisons(suite, found)],
        "recovered": {
            suite: found["oracle_gain_share"][MAIN] for suite, found in suites.items() if MAIN in found["oracle_gain_share"]
        },
        "notes": NOTES,
    }  # fmt: skip


def _measured(suite: Mapping[str, Any], task: str) -> dict[str, Any]:
    scores = [s["tasks"][task] for s in suite["systems"].values() if task in s["tasks"]]
    return {"metric": scores[0]["metric"], "rows": scores[0]["rows"]} if scores else {}


def _system(system: str, suites: Mapping[str, Any], names: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    found = {suite: s["systems"][system] for suite, s in suites.items() if system in s["systems"]}
    return {
        "name": system,
        "kind": kind_of(system),
        "scores": {
            names[suite, task]: {key: score[key] for key in ("mean", "low", "high", "rows")}
            for suite, mine in found.items()
            for task, score in mine["tasks"].items()
        },
        "groups": {
            suite: {key: mine[key] for key in ("mean", "low", "high")} for suite, mine in found.items() if "mean" in mine
        },
    }  # fmt: skip


def kind_of(system: str) -> str:
    """What the page calls a system."""
    kind = system.partition(":")[0]
    if kind in (BASE, ORACLE):
        return kind
    if kind in (BEST_SINGLE, OWN, "single"):
        return "single"
    if kind in (*MERGES, MULTITASK, OTHER):
        return "static"
    return "control" if kind in CONTROLS else "router"


def _comparisons(suite: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """PHATGOOSE against every other system, or, without it, every system against the base."""
    if MAIN in found["against"]:
        return [
            {
                "group": suite,
                "a": MAIN,
                "b": other,
                "difference": -d["difference"],
                "low": -d["high"],
                "high": -d["low"],
            }
            for other, d in found["against"][MAIN].items()
        ]
    return [
        {"group": suite, "a": system, "b": BASE, **{key: d[key] for key in ("difference", "low", "high")}}
        for system, d in found["against"].get(BASE, {}).items()
    ]
