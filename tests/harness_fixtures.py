"""Rows on which lm-evaluation-harness and we must agree, whichever way it is connected, and its two rules by
our engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from conftest import write_rows
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.rank import best, score_choices
from phatgoose.evaluation.rows import encode
from phatgoose.models.base.base import Base, as_base, eval_mode
from phatgoose.models.text.batch import pad_id
from phatgoose.records import Example, SplitName, Task

WORDS = ["red", "blue and green", "the quick fox", "no", "entailment of the dog", "x"]
ROWS = tuple(
    Example(
        f"row {i}: which of them is it" + " lazy" * (i % 4) + "?",
        (WORDS[i % 3],),
        (*WORDS[i % 3 :], *WORDS[: i % 3]),
    )
    for i in range(23)
)


@dataclass(frozen=True)
class HarnessChoices:
    """Which choice each of the harness's rules takes on one row."""

    acc: int
    acc_norm: int


def harness_task(
    task: Task,
    folder: str | Path,
    split: SplitName = "test",
    limit: int | None = None,
    *,
    delimiter: str = " ",
) -> dict[str, Any]:
    """A configuration under which the harness ranks the choices of a task's rows, which are written to `folder`.

    Args:
        delimiter: what stands between prompt and choice; "" for an encoder–decoder, whose choice is a text of its own.

    Raises:
        EvaluationError: a row has no choices, or two right ones.
    """
    folder = Path(folder)
    rows = []
    for number, example in enumerate(task.split(split)[:limit]):
        if example.choices is None or len(example.targets) != 1:
            raise EvaluationError(
                f"row {number} of {task.name!r}: the harness needs choices, one of them right."
            )
        if example.conversation is not None:
            raise EvaluationError(
                f"row {number} of {task.name!r} is a conversation, which the harness isn't given: use `evaluate`."
            )
        if delimiter and example.input[-1:].isspace():
            raise EvaluationError(
                f"row {number} of {task.name!r}: its prompt ends in a line break, which the harness counts "
                "as a part of each choice: its scores would be others. Score it with `evaluate`."
            )
        gold = example.choices.index(example.targets[0])
        rows.append({"prompt": example.input, "choices": list(example.choices), "gold": gold})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    write_rows(path, rows)
    name = "phatgoose_" + "".join(c if c.isalnum() else "_" for c in task.name)
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": delimiter, "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip


def harness_choices(
    model: Base | PreTrainedModel, examples: Sequence[Example], config: EvaluationConfig | None = None
) -> list[HarnessChoices]:
    """What the harness would choose on each row, computed by our engine.

    Raises:
        EvaluationError: a row has no choices, or as `evaluate`.
    """
    base, config = as_base(model), config or EvaluationConfig()
    rows = []
    for number, example in enumerate(examples):
        if example.choices is None:
            raise EvaluationError(f"row {number} has no choices.")
        row = encode(base, example, number, config)
        if any(len(answer) < 2 for answer in row.answers):
            raise EvaluationError(f"row {number}: a choice has no tokens of its own.")
        rows.append(
            replace(row, answers=tuple(answer[:-1] for answer in row.answers))
        )  # without the end token
    with eval_mode(base.model):
        means = score_choices(base.model, rows, pad_id(base.tokenizer), config)
    found = []
    for example, row, scores in zip(examples, rows, means, strict=True):
        sums = [score * len(answer) for score, answer in zip(scores, row.answers, strict=True)]
        norms = [total / len(choice) for total, choice in zip(sums, example.choices or (), strict=True)]
        found.append(HarnessChoices(best(sums), best(norms)))
    return found
