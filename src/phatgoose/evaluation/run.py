"""`evaluate`: scores every row of some tasks, by rank classification or exact match."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.generate import generate, match_exactly
from phatgoose.evaluation.rank import best, score_choices
from phatgoose.evaluation.rouge import graded
from phatgoose.evaluation.rows import OpenRow, encode
from phatgoose.evaluation.statistics import bootstrap_interval, suite_interval
from phatgoose.models.base.base import Base, as_base, eval_mode
from phatgoose.models.text.batch import pad_id
from phatgoose.records import SPLITS, Example, Prediction, Scores, SplitName, Task, TaskScore, groups_of
from phatgoose.registry import unknown

RANK, MATCH = "accuracy (rank)", "exact match"

Progress = Callable[[str, int, int], None]
"""Called with (task, rows done, rows in all) after each batch."""


def evaluate(
    model: Base | PreTrainedModel,
    tasks: Task | Sequence[Task],
    *,
    split: SplitName = "test",
    limit: int | None = None,
    config: EvaluationConfig | None = None,
    progress: bool | Progress = False,
) -> Scores:
    """Accuracy of `model`, routed or not, on one split of each task.

    An example with choices is scored by rank classification (`rank.py`), one without by exact match of a greedy
    generation (`generate.py`). Each task is run by itself, so that its score doesn't depend on its company.

    Args:
        limit: only the first rows of each split.
        progress: True for a bar (none where the output isn't a terminal), or a `Progress` to call.

    Returns:
        One TaskScore per task, with predictions in the order of the split's rows, and the unweighted mean.

    Raises:
        EvaluationError: if a split is empty, two tasks share a name, a row can't be scored (no answers, no prompt, no
            room in the model's context) or the model's logits are not finite; it names task and row.
    """
    base, config = as_base(model), config or EvaluationConfig()
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    chosen = _examples(tasks, split, limit)
    with eval_mode(base.model), _progress(progress) as tell:
        scores = tuple(
            _task_score(base, t, split, rows, config, tell) for t, rows in zip(tasks, chosen, strict=True)
        )
    low, high = suite_interval(
        [[p.points for p in s.predictions] for s in scores],
        groups=[s.groups for s in scores],
        **_bootstrap(config),
    )
    return Scores(scores, sum(s.mean for s in scores) / len(scores), low, high)


def _examples(tasks: Sequence[Task], split: SplitName, limit: int | None) -> list[tuple[Example, ...]]:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be at least 1 row, got {limit}.")
    if not tasks:
        raise EvaluationError("there are no tasks to evaluate.")
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(
            f"tasks must have different names to be told apart; used twice: {', '.join(twice)}."
        )
    for task in tasks:
        if not task.split(split):
            sizes = ", ".join(f"{name} {len(task.split(name))}" for name in SPLITS)
            raise EvaluationError(f"task {task.name!r} has no rows in its {split} split (rows: {sizes}).")
    return [task.split(split)[:limit] for task in tasks]


def _task_score(
    base: Base,
    task: Task,
    split: SplitName,
    examples: Sequence[Example],
    config: EvaluationConfig,
    tell: Progress,
) -> TaskScore:
    count = 0

    def done(rows: int) -> None:
        nonlocal count
        count += rows
        tell(task.name, count, len(examples))

    tell(task.name, 0, len(examples))
    try:
        metric = task.source.get("metric")
        predictions, truncated = predict(base, examples, config, done, metric)
    except EvaluationError as error:
        raise EvaluationError(f"task {task.name!r}, {split} split, {error}") from error
    hits, groups = [p.points for p in predictions], groups_of(examples)
    groups = groups if len(set(groups)) < len(groups) else ()
    low, high = bootstrap_interval(hits, groups=groups, **_bootstrap(config))
    kinds = {(metric or MATCH) if example.choices is None else RANK for example in examples}
    return TaskScore(
        task=task.name, split=split, metric=" / ".join(sorted(kinds)), mean=sum(hits) / len(hits), low=low, high=high,
        rows=len(hits), task_hash=task.hash, predictions=tuple(predictions), truncated_rows=truncated,
        groups=groups,
    )  # fmt: skip


def predict(
    base: Base,
    examples: Sequence[Example],
    config: EvaluationConfig,
    done: Callable[[int], None] = lambda count: None,
    metric: str | None = None,
) -> tuple[list[Prediction], int]:
    """One prediction an example, in order, and how many prompts were cut to fit. The model must be in eval mode.

    `metric` scores generated answers, if it isn't exact match: "rougeL".
    """
    rows = [encode(base, example, index, config) for index, example in enumerate(examples)]
    pad, found = pad_id(base.tokenizer), {}
    ranked = [row for row in rows if not isinstance(row, OpenRow)]
    for row, scores in zip(ranked, score_choices(base.model, ranked, pad, config, done), strict=True):
        example = examples[row.index]
        answer = (example.choices or ())[best(scores)]
        found[row.index] = Prediction(answer in example.targets, answer, choice_scores=scores)
    asked = [row for row in rows if isinstance(row, OpenRow)]
    if metric is None:
        answers = match_exactly(base.model, asked, pad, config, done)
    else:
        made = generate(base.model, asked, pad, config, done, to_the_end=True)
        answers = graded(metric, made, [examples[row.index].targets for row in asked])
    found |= zip([row.index for row in asked], answers, strict=True)
    return [found[index] for index in range(len(examples))], sum(row.truncated for row in rows)


def _bootstrap(config: EvaluationConfig) -> dict[str, Any]:
    return {"level": config.level, "resamples": config.resamples, "seed": config.seed}


@contextlib.contextmanager
def _progress(wanted: bool | Progress) -> Iterator[Progress]:
    if callable(wanted):
        yield wanted
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(console=console, transient=True, disable=not wanted or not console.is_terminal) as bars:
        known: dict[str, Any] = {}

        def tell(task: str, rows: int, total: int) -> None:
            if task not in known:
                known[task] = bars.add_task(task, total=total)
            bars.update(known[task], completed=rows)

        yield tell
