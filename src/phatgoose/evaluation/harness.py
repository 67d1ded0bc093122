"""lm-evaluation-harness: a routed model as one of its models, a task of ours as one of its tasks, and its two rules for choices.

    lm = harness_model(route(base, pool, PHATGOOSE()))          # any object that simple_evaluate takes
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

The harness ranks choices by log p(choice | prompt), summed (`acc`) or divided by the choice's characters (`acc_norm`); the end
token plays no part. Ours (`rank.py`) divides by tokens and includes the end token, as the PHATGOOSE paper does. So the two may answer
a row differently; `harness_choices` computes the harness's answers with our engine, to tell a rule's difference from an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.rank import best, score_choices
from phatgoose.evaluation.rows import encode
from phatgoose.extras import install
from phatgoose.models.base.base import Base, as_base
from phatgoose.models.text.batch import pad_id
from phatgoose.records import Example, SplitName, Task


@dataclass(frozen=True)
class HarnessChoices:
    """Which choice each of the harness's rules takes on one row."""

    acc: int
    acc_norm: int


def harness_model(model: Base | PreTrainedModel, **settings: Any) -> Any:
    """The model, routed or not, as an `lm_eval.models.huggingface.HFLM`; routing that is attached later counts too.

    Args:
        settings: HFLM's own, e.g. batch_size; logits are turned to float32 unless softmax_dtype says otherwise.

    Raises:
        EvaluationError: lm-eval isn't installed.
    """
    base = as_base(model)
    try:
        from phatgoose.evaluation.harness_model import RoutedLM
    except ImportError as cause:
        raise EvaluationError(f"this needs lm-evaluation-harness: {install('harness')}") from cause
    backend = "seq2seq" if base.is_encoder_decoder else "causal"
    own = {"backend": backend, "softmax_dtype": "float32", "device": str(base.device), "batch_size": 8}
    return RoutedLM(pretrained=base.model, tokenizer=base.tokenizer, **{**own, **settings})


def run_harness(
    model: Base | PreTrainedModel,
    tasks: Sequence[str | dict[str, Any]],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` on this model, with every row's answers under "samples".

    Args:
        tasks: names the harness knows, or task configurations (`harness_task`).
        include: a folder with further task files (YAML).
        settings: of simple_evaluate.

    Raises:
        EvaluationError: lm-eval isn't installed, doesn't know a task, or can't load its data.
    """
    lm = harness_model(model)
    import lm_eval
    from lm_eval.tasks import TaskManager

    named = any(isinstance(task, str) for task in tasks)  # indexing the harness's own tasks takes a while
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=named)
    if unknown := [t for t in tasks if isinstance(t, str) and not manager.match_tasks([t])]:
        raise EvaluationError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)} (`lm-eval ls tasks` lists them)."
        )
    base = as_base(model)
    training = base.model.training
    try:
        base.model.eval()
        found = lm_eval.simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, **settings
        )
    except (OSError, ValueError, KeyError) as cause:
        raise EvaluationError(f"lm-evaluation-harness failed: {type(cause).__name__}: {cause}") from cause
    finally:
        base.model.train(training)
    assert found is not None
    return dict(found)


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
                f"row {number} of {task.name!r}: its prompt ends in a line break, which the harness counts as a part of each "
                "choice: its scores would be others. Score it with `evaluate`."
            )
        gold = example.choices.index(example.targets[0])
        rows.append({"prompt": example.input, "choices": list(example.choices), "gold": gold})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    name = "phatgoose_" + "".join(c if c.isalnum() else "_" for c in task.name)
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold",
        "target_delimiter": delimiter, "num_fewshot": 0, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
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
        row, _ = encode(base, example, number, config)
        if any(len(answer) < 2 for answer in row.answers):
            raise EvaluationError(f"row {number}: a choice has no tokens of its own.")
        rows.append(
            replace(row, answers=tuple(answer[:-1] for answer in row.answers))
        )  # without the end token
    training = base.model.training
    try:
        base.model.eval()
        with torch.no_grad():
            means = score_choices(base.model, rows, pad_id(base.tokenizer), config)
    finally:
        base.model.train(training)
    found = []
    for example, row, scores in zip(examples, rows, means, strict=True):
        sums = [score * len(answer) for score, answer in zip(scores, row.answers, strict=True)]
        norms = [total / len(choice) for total, choice in zip(sums, example.choices or (), strict=True)]
        found.append(HarnessChoices(best(sums), best(norms)))
    return found
