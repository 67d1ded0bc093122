"""ROUGE-L of generated answers, by the package rouge-score.

The paper scores BIG-bench's conlang_translation by it. It is the F-measure of the longest common
subsequence of words (lower case, letters and digits only, no stemming), as `evaluate`'s rouge gives it; of
several targets the best counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phatgoose.errors import EvaluationError
from phatgoose.extras import install
from phatgoose.records import Prediction
from phatgoose.registry import unknown

METRICS = ("rougeL",)


def graded(
    metric: str, predictions: Sequence[Prediction], targets: Sequence[Sequence[str]]
) -> list[Prediction]:
    """The predictions with their `value` under `metric`; one is correct where that is 1.

    Raises:
        UnknownName: there is no such metric.
        EvaluationError: rouge-score isn't installed.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    values = [rouge_l(p.text, t) for p, t in zip(predictions, targets, strict=True)]
    return [replace(p, value=v, correct=v == 1) for p, v in zip(predictions, values, strict=True)]


def rouge_l(text: str, targets: Sequence[str]) -> float:
    """The best ROUGE-L F-measure of `text` against any target, in [0, 1]."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as cause:
        raise EvaluationError(f"ROUGE needs the package rouge-score: {install('experiment')}") from cause
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return max(float(scorer.score(target, text)["rougeL"].fmeasure) for target in targets)
