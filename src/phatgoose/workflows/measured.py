"""Evaluations that are done once: scores kept on disk under a key of everything they depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.results import scores_from_json, scores_to_json
from phatgoose.evaluation.run import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json, sha256_json, write_json
from phatgoose.models.base import Base
from phatgoose.models.routed import route, unroute
from phatgoose.records import SplitName, Task, TaskScore
from phatgoose.routers import Router

Progress = Callable[[str, int, int], None]


class Measurements:
    """Scores of one base with different pools and routers, in one folder; a killed run repeats at most one evaluation."""

    def __init__(self, base: Base, folder: Path, config: EvaluationConfig | None = None):
        self.base, self.folder = base, folder
        self.config = config or EvaluationConfig()

    def score(
        self,
        task: Task,
        pool: Pool | None,
        router: Router | None,
        *,
        split: SplitName = "test",
        limit: int,
        progress: Progress | bool = False,
    ) -> TaskScore:
        """The score of `router` over `pool` (of the bare base if they are None) on the first `limit` rows of a split."""
        experts = [] if pool is None else [[e.name, e.hash] for e in pool.experts]
        key = {
            "base": self.base.fingerprint.to_json(),
            "dtype": str(self.base.model.dtype),
            "experts": experts,
            "router": None if router is None else router.describe(),
            "task": task.hash,
            "split": split,
            "limit": limit,
            "evaluation": [self.config.level, self.config.resamples, self.config.seed],
        }
        path = self.folder / f"{sha256_json(key)[:24]}.json"
        if path.exists():
            return self._read(path)
        try:
            if pool is not None:
                route(self.base, pool, router)
            scores = evaluate(
                self.base, task, split=split, limit=limit, config=self.config, progress=progress
            )
        finally:
            unroute(self.base)
        write_json(path, {"key": key, "scores": scores_to_json(scores)})
        return scores.tasks[0]

    @staticmethod
    def _read(path: Path) -> TaskScore:
        data: Any = read_json(path, EvaluationError)
        if not isinstance(data, dict):
            raise EvaluationError(f"{path} is not a measurement; delete it to measure again.")
        return scores_from_json(data.get("scores")).tasks[0]
