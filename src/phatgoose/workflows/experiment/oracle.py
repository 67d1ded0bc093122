"""Which expert labels choose: the oracle's for each task, the best single one for a suite.

Both go by a few validation rows, so many experts tie. A tie goes to the expert under which right choices are
likelier, then to the first one of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phatgoose.records import Example, TaskScore
from phatgoose.workflows.experiment.systems import BEST_SINGLE, ORACLE

Standing = Sequence[float | None]
"""(mean score on a task's validation rows, mean log-likelihood per token of right choices; None if no row has
choices)."""


def standing(score: TaskScore, rows: Sequence[Example]) -> list[float | None]:
    """What an expert is chosen by on one task, from its score on these rows."""
    found = [
        max(s for choice, s in zip(row.choices, made.choice_scores, strict=True) if choice in row.targets)
        for row, made in zip(rows, score.predictions, strict=True)
        if row.choices is not None and made.choice_scores is not None
    ]
    return [score.mean, sum(found) / len(found) if found else None]


def best(scores: Mapping[str, Sequence[Standing]]) -> str:
    """The expert that is best over some tasks, from expert → its standing on each of them."""
    return max(scores, key=lambda expert: rank(scores[expert]))


def rank(standings: Sequence[Standing]) -> tuple[float, float]:
    """Sorts experts, the best last. Rounded, so that the order of summing doesn't tip a tie."""
    return round(sum(mean or 0.0 for mean, _ in standings), 9), sum(likely or 0.0 for _, likely in standings)


def picks(
    scores: Mapping[str, Mapping[str, Standing]], names: Sequence[str], tasks: Sequence[str]
) -> dict[str, dict[str, str]]:
    """System → task → expert, from expert → task → its standing there.

    A task on which no expert could be scored has no oracle. An expert that couldn't be scored where others were
    can't be best-single.

    Args:
        names: the tasks that can be chosen on.
        tasks: all of the suite.
    """
    oracle = {}
    for task in names:
        if able := {e: [scores[e][task]] for e in scores if task in scores[e]}:
            oracle[task] = best(able)
    # An expert scored on fewer tasks has a smaller sum for that reason alone, so only complete ones are compared.
    most = max((len(found) for found in scores.values()), default=0)
    if not most:
        return {ORACLE: oracle, BEST_SINGLE: {}}
    whole = [e for e in scores if len(scores[e]) == most]
    common = [t for t in names if all(t in scores[e] for e in whole)]
    one = best({e: [scores[e][t] for t in common] for e in whole})
    return {ORACLE: oracle, BEST_SINGLE: dict.fromkeys(tasks, one)}
