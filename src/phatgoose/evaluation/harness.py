"""lm-evaluation-harness: a model, routed or not, as one of its models.

    lm = harness_model(route(base, pool, PHATGOOSE()))          # any object that simple_evaluate takes
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

The harness ranks choices by log p(choice | prompt), summed (`acc`) or divided by the choice's characters
(`acc_norm`); the end token plays no part. Ours (`rank.py`) divides by tokens and includes the end token, as
the PHATGOOSE paper does. So the two may answer a row differently. The tests compute the harness's answers with
our engine, to tell a difference in the rules from an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from phatgoose.errors import EvaluationError
from phatgoose.extras import install
from phatgoose.models.base.base import Base, as_base, eval_mode


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
        tasks: names the harness knows, or task configurations.
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
    try:
        with eval_mode(as_base(model).model):
            found = lm_eval.simple_evaluate(
                model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, **settings
            )
    except (OSError, ValueError, KeyError) as cause:
        raise EvaluationError(f"lm-evaluation-harness failed: {type(cause).__name__}: {cause}") from cause
    assert found is not None
    return dict(found)
