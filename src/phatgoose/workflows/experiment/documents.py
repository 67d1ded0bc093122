"""An experiment's results.md and plot.svg. `cli/measure/experiment.py` makes the tables on the screen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from phatgoose.templates import templates
from phatgoose.workflows.experiment.admission import admission_tables
from phatgoose.workflows.experiment.hits import hit_table
from phatgoose.workflows.experiment.measures.tables import measure_sections, tier_sections
from phatgoose.workflows.experiment.recipe import IN_POOL
from phatgoose.workflows.experiment.systems import (
    BASE,
    CHOSEN,
    MAIN,
    MULTITASK,
    ORACLE,
    OTHER,
    TOLD,
)

LABEL, WIDTH, VALUE, ROW, HEAD, LEGEND = 190, 300, 60, 20, 44, 32
COLOURS = {
    "PHATGOOSE": "#c2410c",
    "routers, merges, controls": "#1d4ed8",
    "told the task, or trained on all data": "#7e22ce",
    "base": "#777",
}


def markdown(results: Mapping[str, Any]) -> str:
    """results.md: per suite the systems, then the tasks; contamination; what failed; how it was made."""
    shown = {name: _suite(name, s, results) for name, s in results["suites"].items() if s["common_tasks"]}
    page = templates(__package__, escaped=False, table=_table).get_template("results.md.j2")
    return page.render(
        results,
        shown=shown,
        admissions={n: admission_tables(s.get("admission", {})) for n, s in results["suites"].items()},
        overview=_overview({name: results["suites"][name] for name in shown}),
        mixed=[k for k, values in results["measured"].items() if k != "base" and len(values) > 1],
        recipe_json=json.dumps(results["recipe"], indent=2, ensure_ascii=False),
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in Markdown; the first one is the head."""
    head, *others = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *others])


def _overview(suites: Mapping[str, Any]) -> list[list[str]]:
    """Every system's mean on every suite, and whether it differs from the base's; the best overall on top."""
    means: dict[str, dict[str, float]] = {}
    for name, suite in suites.items():
        for system, found in suite["systems"].items():
            if "mean" in found:
                means.setdefault(system, {})[name] = found["mean"]
    ranked = sorted(means, key=lambda system: (-len(means[system]), -sum(means[system].values())))

    def cell(system: str, name: str) -> str:
        if name not in means[system]:
            return ""
        found = suites[name]["against"].get(BASE, {}).get(system)
        mark = "" if found is None or found["p_holm"] >= 0.05 else " ▲" if found["difference"] > 0 else " ▼"
        return f"{means[system][name]:.3f}{mark}"

    return [
        ["system", *suites],
        *([system, *(cell(system, name) for name in suites)] for system in ranked),
        ["*guessing*", *(f"{guessing(suite):.3f}" for suite in suites.values())],
        ["*blind choice*", *(f"{blind_choice(suite):.3f}" for suite in suites.values())],
    ]


def _suite(name: str, suite: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What results.md says of a suite."""
    scores = _scores(suite)
    few = [
        f"{task} ({info['choice_rows']} of {info['choice_raw_rows']})"
        for task, info in suite["tasks"].items()
        if info.get("choice_raw_rows", 0) < info.get("choice_rows", 0)
    ]
    return {
        "scores": scores,
        "guessing": guessing(suite),
        "blind_choice": blind_choice(suite),
        "systems": _systems(suite),
        "rows": sum(score["rows"] for score in scores.values()),
        "raw_rows": sum(score["raw_rows"] for score in scores.values()),
        "few": few if results["chosen"].keys() & {*CHOSEN} else [],
        "tasks": _tasks(suite, results["chosen"].get(ORACLE, {}).get(name, {})),
        "hits": hit_table(suite["hits"]) if "hits" in suite else [],
        "measures": measure_sections(suite),
        "tiers": tier_sections(suite),
        "notes": _notes(name, suite, results["training_rows"]),
    }


def _scores(suite: Mapping[str, Any]) -> dict[str, Any]:
    """A score for each common task, of any system: all were measured on the same rows."""
    measured = next(found for found in suite["systems"].values() if "mean" in found)["tasks"]
    return {task: measured[task] for task in suite["common_tasks"]}


def _ranked(suite: Mapping[str, Any]) -> dict[str, Any]:
    """System → what it scored, the best mean first."""
    whole = [(system, found) for system, found in suite["systems"].items() if "mean" in found]
    return dict(sorted(whole, key=lambda item: -item[1]["mean"]))


def _systems(suite: Mapping[str, Any]) -> list[list[str]]:
    rows = [["system", "mean", "− base", "p", "− PHATGOOSE", "p", "of the oracle's gain"]]
    for system, mine in _ranked(suite).items():
        cells = [system, f"{mine['mean']:.3f} ({mine['low']:.3f}–{mine['high']:.3f})"]
        for other in (BASE, MAIN):
            if found := suite["against"].get(other, {}).get(system):
                difference = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
                cells += [difference, f"{found['p_holm']:.3f}"]
            else:
                cells += ["", ""]
        share = suite["oracle_gain_share"].get(system)
        if not share:
            cells.append("")
        elif share.get("low") is None:
            cells.append("not defined: the oracle gains too little")
        else:
            cells.append(f"{share['share']:.0%} ({share['low']:.0%} to {share['high']:.0%})")
        rows.append(cells)
    return rows


def _tasks(suite: Mapping[str, Any], picks: Mapping[str, str]) -> list[list[str]]:
    """What each task's numbers mean (100 of 38 rows: several show one raw row), then what each system scores."""
    ranked = _ranked(suite)
    rows = [["task", "rows", "measure", "guessing", *(["oracle's expert"] if picks else []), *ranked]]
    for task, score in _scores(suite).items():
        info = suite["tasks"][task]
        of_raw = f" of {score['raw_rows']}" if score["raw_rows"] < score["rows"] else ""
        guess = "" if (g := _guess(info)) is None else f"{g:.2f}"
        pick = f"{picks[task]} (on {info['choice_rows']})" if task in picks else ""
        means = [f"{found['tasks'][task]['mean']:.2f}" for found in ranked.values()]
        rows.append(
            [task, f"{score['rows']}{of_raw}", score["metric"], guess, *([pick] if picks else []), *means]
        )
    return rows


def _notes(name: str, suite: Mapping[str, Any], training: Mapping[str, Sequence[str]]) -> list[str]:
    """What was left out, shared with training rows, or cut."""
    notes = [f"Left out: {task}: {why}" for task, why in suite["left_out"].items()]
    own = name == IN_POOL  # a task isn't held against its own expert's rows
    others = "other experts' training row" if own else "training row"
    found, read = suite["contamination"], training["read"]
    shared = [
        f"Contamination: {len(c['flagged'])} of {c['rows']} rows of {task} share text with {others}s, of "
        f"{', '.join(c['trained'])}."
        for task, c in found.items()
        if c["flagged"]
    ]
    looked = sum(c["rows"] for task, c in found.items() if set(read) - ({task} if own else set()))
    notes += shared
    if looked and not shared:
        notes.append(
            f"Contamination: none of {looked} rows shares 13 words in a row, or as a whole, with any of the {others}s."
        )
    if training["unread"]:
        notes.append(f"Contamination: not looked at: the training rows of {', '.join(training['unread'])}.")
    elif not looked:
        notes.append("Contamination: not looked at: there are no other experts' training rows.")
    notes += [f"{task}: {info['note']}" for task, info in suite["tasks"].items() if info.get("note")]
    for task in suite["common_tasks"]:
        if cut := max(s["tasks"][task]["cut"] for s in suite["systems"].values() if task in s["tasks"]):
            notes.append(f"{task}: {cut} prompts were cut at the left to fit the model's context.")
    return notes


def guessing(suite: Mapping[str, Any]) -> float:
    """What guessing scores, the mean over a suite's common tasks; 0 for a task whose answers are graded."""
    return sum(_guess(suite["tasks"][t]) or 0.0 for t in suite["common_tasks"]) / len(suite["common_tasks"])


def blind_choice(suite: Mapping[str, Any]) -> float:
    """What drawing one of each row's choices scores, the mean over the common tasks; 0 for a task without choices."""
    return sum(suite["tasks"][t]["chance"] or 0.0 for t in suite["common_tasks"]) / len(suite["common_tasks"])


def _guess(info: Mapping[str, Any]) -> float | None:
    """What is scored without reading prompts: by a random choice, or by the commonest answer of the measured rows."""
    return max((g for g in (info["commonest"], info["chance"]) if g is not None), default=None)


def plot(results: Mapping[str, Any]) -> str:
    """plot.svg: each suite's systems with mean and interval; dashed the base's mean, dotted what guessing scores."""
    suites = {name: suite for name, suite in results["suites"].items() if _ranked(suite)}
    across, column = min(2, max(1, len(suites))), LABEL + WIDTH + VALUE
    panels: list[dict[str, Any]] = []
    top = height = LEGEND
    for number, (name, suite) in enumerate(suites.items()):
        if number % across == 0:
            top = height
        panels.append(_panel(name, suite, number % across * column, top))
        height = max(height, panels[-1]["last"] + 24)
    svg = templates(__package__, escaped=True).get_template("plot.svg.j2").render(
        panels=panels, width=max(across * column, 2 * column - LABEL), height=height, colours=COLOURS, kind=_kind,
        main=MAIN, row=ROW, names=LABEL - 8, values=LABEL + WIDTH + 8,
    )  # fmt: skip
    return (
        svg.replace("\n", "") + "\n"
    )  # not splitlines(): names may hold what it takes for the end of a line


def _panel(name: str, suite: Mapping[str, Any], left: int, top: int) -> dict[str, Any]:
    systems, guess = _ranked(suite), guessing(suite)
    lowest = min(guess, *(found["low"] for found in systems.values()))
    highest = max(guess, *(found["high"] for found in systems.values()))
    pad = max(0.01, (highest - lowest) * 0.05)
    low, high = max(0.0, lowest - pad), min(1.0, highest + pad)
    # Round numbers, at most five steps: the axis lies in [0, 1] and is at least 0.01 wide.
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if high - low <= 5 * s)
    return {
        "left": left,
        "top": top,
        "first": top + HEAD,
        "last": top + HEAD + ROW * len(systems),
        "head": f"{name} ({len(suite['common_tasks'])} tasks)",
        "x": lambda value: round(left + LABEL + WIDTH * (value - low) / (high - low), 1),
        "ticks": [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)],
        "lines": ({"base": systems[BASE]["mean"]} if BASE in systems else {}) | {"guess": guess},
        "systems": systems,
    }


def _kind(system: str) -> str:
    """The kind of a system, which has a colour."""
    if system == MAIN:
        return "PHATGOOSE"
    if system == BASE:
        return "base"
    told = system in TOLD or system.partition(":")[0] in (MULTITASK, OTHER)
    return "told the task, or trained on all data" if told else "routers, merges, controls"
