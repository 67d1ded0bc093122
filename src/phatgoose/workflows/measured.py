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

    def __init__(
        self, base: Base, folder: Path, config: EvaluationConfig | None = None, backend: str = "auto"
    ):
        self.base, self.folder, self.backend = base, folder, backend
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
        """The score, as `measure` puts it into a file."""
        return self.read(self.measure(task, pool, router, split=split, limit=limit, progress=progress))

    def measure(
        self,
        task: Task,
        pool: Pool | None,
        router: Router | None,
        *,
        split: SplitName = "test",
        limit: int,
        progress: Progress | bool = False,
    ) -> Path:
        """The file with the score of `router` over `pool` (of the bare base if they are None) on the first `limit` rows of a split."""
        experts = [] if pool is None else [[e.name, e.hash] for e in pool.experts]
        key: dict[str, Any] = {
            "base": self.base.fingerprint.to_json(),
            "dtype": str(self.base.model.dtype),
            "experts": experts,
            "router": None if router is None else router.describe(),
            "task": task.hash,
            "split": split,
            "limit": limit,
            "evaluation": [self.config.level, self.config.resamples, self.config.seed],
        }
        # Only where they say something, so that measurements from before they existed are found again.
        if metric := task.source.get("metric"):
            key["metric"] = metric
        if self.backend != "auto":
            key["backend"] = self.backend
        if pool is not None and router is not None and router.reads:
            key["signatures"] = [e.signature.hash if e.signature else None for e in pool.experts]
        path = self.folder / f"{sha256_json(key)[:24]}.json"
        if path.exists():
            return path
        try:
            if pool is not None:
                route(self.base, pool, router, backend_name=self.backend)
            scores = evaluate(
                self.base, task, split=split, limit=limit, config=self.config, progress=progress
            )
        finally:
            unroute(self.base)
        write_json(path, {"key": key, "scores": scores_to_json(scores)})
        return path

    @staticmethod
    def read(path: Path) -> TaskScore:
        """The score in a file that `measure` wrote.

        Raises:
            EvaluationError: it is damaged.
        """
        data: Any = read_json(path, EvaluationError)
        if not isinstance(data, dict):
            raise EvaluationError(f"{path} is not a measurement; delete it to measure again.")
        return scores_from_json(data.get("scores")).tasks[0]
