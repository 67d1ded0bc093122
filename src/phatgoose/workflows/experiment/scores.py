"""A cache of scores on disk: each is found again by a key of everything it depends on."""

from __future__ import annotations

import hashlib
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import phatgoose
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.results import scores_from_json, scores_to_json
from phatgoose.evaluation.run import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json, sha256_json, write_json
from phatgoose.models.attach.attach import route_with, unroute
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.ops import auto_is
from phatgoose.records import SplitName, Task, TaskScore, groups_of
from phatgoose.routers import Router

RESAMPLES = 20_000
"""Resamples of all intervals and p-values. Holm over 25 systems multiplies the smallest p-value by 24, to 0.0024."""
EVALUATION = EvaluationConfig(resamples=RESAMPLES)

_SCORE_SOURCES = ("records.py", "evaluation", "experts", "models", "ops", "routers", "tasks")
"""The parts of the package's source that can change a score."""
_SOURCE_ENDINGS = (".py", ".cpp", ".h", ".inc", ".toml", ".json")


@cache
def code_version() -> str:
    """phatgoose's version and a hash of the source that scores depend on: scores of older code are measured again.

    Any edit there measures everything again, even one that changes no score. Training, serving and pages aren't
    part of it.
    """
    root, digest = Path(phatgoose.__file__).parent, hashlib.sha256()
    for part in _SCORE_SOURCES:
        place = root / part
        files = [p for p in place.rglob("*") if p.suffix in _SOURCE_ENDINGS] if place.is_dir() else [place]
        for path in sorted(files):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return f"{version('phatgoose')}+{digest.hexdigest()[:16]}"


class ScoreCache:
    """Scores of one base under pools and routers, in a folder. A killed run repeats at most one evaluation."""

    def __init__(self, base: Base, folder: Path, options: RouteOptions | None = None):
        self.base, self.folder, self.options = base, folder, options or RouteOptions()

    def score(
        self, task: Task, pool: Pool | None, router: Router | None, *, split: SplitName = "test", limit: int
    ) -> TaskScore:
        """The score that `measure` puts into a file."""
        return self.read(self.measure(task, pool, router, split=split, limit=limit))

    def measure(
        self, task: Task, pool: Pool | None, router: Router | None, *, split: SplitName = "test", limit: int
    ) -> Path:
        """The file with the score of `router` over `pool`, or of the base, on a split's first `limit` rows."""
        path, key = self._entry(task, pool, router, split, limit)
        if path.exists():
            return path
        started = time.monotonic()
        try:
            if pool is not None:
                route_with(self.base, pool, router, self.options)
            scores = evaluate(self.base, task, split=split, limit=limit, config=EVALUATION)
        finally:
            unroute(self.base)
        # The number of threads changes at most the last bits: it is recorded, but not part of the key.
        made = {"threads": torch.get_num_threads(), "seconds": round(time.monotonic() - started, 3)}
        write_json(path, {"key": key, "made": made, "scores": scores_to_json(scores)})
        return path

    def _entry(
        self, task: Task, pool: Pool | None, router: Router | None, split: SplitName, limit: int
    ) -> tuple[Path, dict[str, Any]]:
        """(where the score belongs, everything it depends on)."""
        experts = [] if pool is None else [[e.name, e.hash] for e in pool.experts]
        key: dict[str, Any] = {
            "base": self.base.fingerprint.to_json(),
            "dtype": str(self.base.model.dtype),
            "experts": experts,
            "router": None if router is None else router.describe(),
            "task": task.hash,
            **chat_template_key(self.base, task),
            "split": split,
            "limit": limit,
            "evaluation": [EVALUATION.level, EVALUATION.resamples, EVALUATION.seed],
            "code": code_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "device": self.base.device.type,
        }
        if metric := task.source.get("metric"):
            key["metric"] = metric
        if pool is not None:
            name = self.options.backend
            key["backend"] = auto_is(self.base.device.type)[0] if name == "auto" else name
        groups = groups_of(task.split(split)[:limit])
        if len(set(groups)) < len(groups):
            key["groups"] = groups  # not part of the task's hash
        if pool is not None and router is not None and router.reads:
            key["signatures"] = [e.signature.hash if e.signature else None for e in pool.experts]
        return self.folder / f"{sha256_json(key)[:24]}.json", key

    @staticmethod
    def read(path: Path) -> TaskScore:
        """The score in a file that `measure` wrote."""
        data: Any = read_json(path, EvaluationError)
        if not isinstance(data, dict):
            raise EvaluationError(f"{path} is not a measurement; delete it to measure again.")
        return scores_from_json(data.get("scores")).tasks[0]
