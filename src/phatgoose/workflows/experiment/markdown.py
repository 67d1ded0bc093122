"""An experiment's results.md; the tables on the screen are made by `cli/measure/experiment.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phatgoose.workflows.experiment.recipe import IN_POOL
from phatgoose.workflows.experiment.systems import BASE, BEST_SINGLE, MAIN, ORACLE


def markdown(results: Mapping[str, Any]) -> str:
    """The tables: per suite the systems, then the tasks; contamination; what failed; how it was made."""
    recipe, made = results["recipe"], results["made"]
    lines = [f"# Experiment on {recipe['base']}", ""]
    lines += [
        f"{len(results['experts'])} experts, made {made['when']} with phatgoose {made['phatgoose']}, torch "
        f"{made['torch']}, transformers {made['transformers']}, peft {made['peft']} on {made['machine']}. Means are "
        "unweighted over tasks, intervals are 95 % by bootstrap over rows (over raw rows, where a task shows one under "
        "several prompts), differences are paired by row, p-values are adjusted by Holm over the systems of a suite, "
        f"and can't be less than {2 / (results['resamples'] + 1):.2g} before that: {results['resamples']} resamples. "
        "*Blind choice* is what a draw among each row's choices scores (0 where it has none); *guessing* is that or "
        "the commonest answer of a task's measured rows, whichever scores more, so it knows a little of them.",
        "",
    ]
    lines += [_computed(results["measured"]), ""]
    if results["chosen"].get(ORACLE):
        lines += [
            "Oracle and best-single choose by validation rows, as few as the tables say: they are no upper bounds, "
            "and a share of the oracle's gain can exceed 100 %.",
            "",
        ]
    lines += _overview(results["suites"])
    for name, suite in results["suites"].items():
        lines += _suite(name, suite, results["chosen"], results["training_rows"])
    lines += _failed(results)
    lines += ["## Recipe", "", "```json", _json(recipe), "```", ""]
    return "\n".join(lines)


def _computed(measured: Mapping[str, Sequence[Any]]) -> str:
    """How the scores were computed, and what wasn't the same for all of them."""
    said = {
        k: [str(v).removeprefix("torch.") for v in values] for k, values in measured.items() if k != "base"
    }
    text = "Scores were computed in {dtype} on {device} (threads: {threads}), routed by backend {backend}, code {code}."
    text = text.format(**{k: " and ".join(v) or "–" for k, v in said.items()})
    mixed = [k for k, v in said.items() if len(v) > 1]
    return text + (f" **Not all in one way: {', '.join(mixed)} differ.**" if mixed else "")


def _overview(suites: Mapping[str, Any]) -> list[str]:
    """Every system's mean on every suite, and whether it differs from the base's; the best overall on top."""
    measured = {name: suite for name, suite in suites.items() if suite["common_tasks"]}
    if len(measured) < 2:
        return []
    means = {
        (system, name): found["mean"]
        for name, suite in measured.items()
        for system, found in suite["systems"].items()
        if "mean" in found
    }
    systems = list(dict.fromkeys(system for system, _ in means))
    whole = {s: [means[s, n] for n in measured if (s, n) in means] for s in systems}
    systems.sort(key=lambda s: (-len(whole[s]), -sum(whole[s])))

    def cell(system: str, name: str) -> str:
        if (system, name) not in means:
            return ""
        found = measured[name]["against"].get(BASE, {}).get(system)
        mark = "" if found is None or found["p_holm"] >= 0.05 else " ▲" if found["difference"] > 0 else " ▼"
        return f"{means[system, name]:.3f}{mark}"

    rows = [[system, *(cell(system, name) for name in measured)] for system in systems]
    rows.append(["*guessing*", *(f"{guessing(suite):.3f}" for suite in measured.values())])
    rows.append(["*blind choice*", *(f"{blind_choice(suite):.3f}" for suite in measured.values())])
    return [
        "## Overview",
        "",
        "Mean scores; ▲ better and ▼ worse than the base by more than the choice of rows explains (adjusted p < 0.05). "
        "Systems stand by the sum of their means.",
        "",
        *_table(["system", *measured], rows),
    ]


def _suite(
    name: str, suite: Mapping[str, Any], chosen: Mapping[str, Any], training: Mapping[str, Sequence[str]]
) -> list[str]:
    lines = [f"## {name}", ""]
    if not suite["common_tasks"]:
        return [*lines, "No task was measured with every system.", ""]
    blind = f"Guessing scores {guessing(suite):.3f}, blind choice {blind_choice(suite):.3f}."
    lines += [f"{len(suite['common_tasks'])} tasks. {blind}", ""]
    lines += _table(
        ["system", "mean", "− base", "p", "− PHATGOOSE", "p", "of the oracle's gain"],
        [_system(s, suite) for s in _ranked(suite)],
    )
    systems = _ranked(suite)
    lines += _raw(suite, chosen)
    picks = chosen.get(ORACLE, {}).get(name, {})
    rows = [
        [task, *_task(task, suite, picks.get(task))]
        + [f"{suite['systems'][s]['tasks'][task]['mean']:.2f}" for s in systems]
        for task in suite["common_tasks"]
    ]
    head = ["task", "rows", "measure", "guessing", *(["oracle's expert"] if picks else []), *systems]
    lines += _table(head, rows)
    lines += _notes(name, suite, training)
    return lines


def _raw(suite: Mapping[str, Any], choosing: Mapping[str, Any]) -> list[str]:
    """How many of a suite's rows are independent of each other, if not all are."""
    scores = [next(iter(suite["systems"].values()))["tasks"][t] for t in suite["common_tasks"]]
    rows, raw = (sum(s[key] for s in scores) for key in ("rows", "raw_rows"))
    if raw == rows:
        return []
    text = f"The {rows} rows show {raw} different raw rows, some under several prompts"
    few = [
        f"{task} ({info['choice_rows']} of {info['choice_raw_rows']})"
        for task, info in suite["tasks"].items()
        if info.get("choice_raw_rows", 0) < info.get("choice_rows", 0)
        and {ORACLE, BEST_SINGLE} & choosing.keys()
    ]
    chosen = f" Oracle and best-single choose on rows of other raw rows: {', '.join(few)}." if few else ""
    return [f"{text} (100 of 38: 100 rows of 38 raw rows).{chosen}", ""]


def _task(task: str, suite: Mapping[str, Any], pick: str | None) -> list[str]:
    """What a task's numbers mean: its rows, how they are scored, what guessing scores, the oracle's expert."""
    score, info = next(iter(suite["systems"].values()))["tasks"][task], suite["tasks"][task]
    blind = "" if (g := _guess(info)) is None else f"{g:.2f}"
    chosen = [] if pick is None else [f"{pick} (on {info['choice_rows']})"]
    return [_rows(score), score["metric"], blind, *chosen]


def guessing(suite: Mapping[str, Any]) -> float:
    """What guessing scores, the mean over a suite's common tasks; 0 for a task whose answers are graded."""
    return sum(_guess(suite["tasks"][t]) or 0.0 for t in suite["common_tasks"]) / len(suite["common_tasks"])


def blind_choice(suite: Mapping[str, Any]) -> float:
    """What drawing one of each row's choices scores, the mean over the common tasks; 0 for a task without choices."""
    return sum(suite["tasks"][t]["chance"] or 0.0 for t in suite["common_tasks"]) / len(suite["common_tasks"])


def _guess(info: Mapping[str, Any]) -> float | None:
    """What can be scored without reading prompts: by a random choice, or by always giving the commonest answer.

    The commonest answer is that of the measured rows, so this is a little more than a guesser could know.
    """
    return max((g for g in (info["commonest"], info["chance"]) if g is not None), default=None)


def _rows(score: Mapping[str, Any]) -> str:
    """100, or where several show one raw row, 100 of 38."""
    return str(score["rows"]) + (f" of {score['raw_rows']}" if score["raw_rows"] < score["rows"] else "")


def _system(system: str, suite: Mapping[str, Any]) -> list[str]:
    mine = suite["systems"][system]
    cells = [system, f"{mine['mean']:.3f} ({mine['low']:.3f}–{mine['high']:.3f})"]
    for other in (BASE, MAIN):
        found = suite["against"].get(other, {}).get(system)
        if found is None:
            cells += ["", ""]
        else:
            cells += [
                f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})",
                f"{found['p_holm']:.3f}",
            ]
    share = suite["oracle_gain_share"].get(system, {})
    text = ""
    if share.get("low") is not None:
        text = f"{share['share']:.0%} ({share['low']:.0%} to {share['high']:.0%})"
    elif share:
        text = "not defined: the oracle gains too little"
    return [*cells, text]


def _notes(name: str, suite: Mapping[str, Any], training: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [f"- Left out: {task}: {why}" for task, why in suite["left_out"].items()]
    lines += [f"- Contamination: {said}" for said in _contamination(name, suite, training)]
    notes = {t: info["note"] for t, info in suite["tasks"].items() if info.get("note")}
    lines += [f"- {task}: {note}" for task, note in notes.items()]
    cut = {
        t: max(s["tasks"][t]["cut"] for s in suite["systems"].values() if t in s["tasks"])
        for t in suite["common_tasks"]
    }  # fmt: skip
    lines += [
        f"- {task}: {n} prompts were cut at the left to fit the model's context."
        for task, n in cut.items()
        if n
    ]
    return [*lines, ""] if lines else []


def _contamination(name: str, suite: Mapping[str, Any], training: Mapping[str, Sequence[str]]) -> list[str]:
    """What measured rows share with training rows, and the experts of which nothing is known."""
    own = name == IN_POOL  # a task isn't held against its own expert's rows
    others = "other experts' training row" if own else "training row"
    read, found = training["read"], suite["contamination"]
    lines = [
        f"{len(c['flagged'])} of {c['rows']} rows of {task} share text with {others}s, of {', '.join(c['trained'])}."
        for task, c in found.items()
        if c["flagged"]
    ]
    looked = sum(c["rows"] for task, c in found.items() if set(read) - ({task} if own else set()))
    if looked and not lines:
        lines = [f"none of {looked} rows shares 13 words in a row, or as a whole, with any of the {others}s."]
    if training["unread"]:
        lines.append(f"not looked at: the training rows of {', '.join(training['unread'])}.")
    elif not looked:
        lines.append("not looked at: there are no other experts' training rows.")
    return lines


def _failed(results: Mapping[str, Any]) -> list[str]:
    if not results["failed"]:
        return []
    lines = [f"- {what}: {why}" for what, why in results["failed"].items()]
    return ["## What failed", "", "The same command runs these again.", "", *lines, ""]


def _ranked(suite: Mapping[str, Any]) -> list[str]:
    """Systems by their mean, the best first."""
    return sorted(
        (s for s, v in suite["systems"].items() if "mean" in v), key=lambda s: -suite["systems"][s]["mean"]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return [*("| " + " | ".join(row) + " |" for row in (escaped[0], marks, *escaped[1:])), ""]


def _json(data: Any) -> str:
    import json

    return json.dumps(data, indent=2, ensure_ascii=False)
