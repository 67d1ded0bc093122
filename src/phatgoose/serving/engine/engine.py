"""What runs the model. There is one thread that does; everybody else hands it jobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from phatgoose.models.base.base import Base
from phatgoose.models.batched.attach import MultiRouter
from phatgoose.models.batched.plan import BatchPlan
from phatgoose.serving.engine.job import Job, told
from phatgoose.serving.logs import log
from phatgoose.serving.settings import ServeSettings


class Engine(ABC):
    """Writes the answers of many jobs at once, each its own way.

    `submit` and `cancel` are called on the event loop; a cancelled job gets no more news.
    """

    limit: int | None
    """The most tokens that a prompt and its answer may have together; None: no limit of the model's."""

    def __init__(self, base: Base, settings: ServeSettings):
        self.base, self.settings = base, settings
        self.multi_router = MultiRouter(base.model)
        self.jobs: dict[str, Job] = {}
        self.passes = 0
        self.on_load: Callable[[Job, Tensor, int], None] = lambda job, weights, choices: None
        """Told the weights of each pass that was watched: of one job's tokens float64 [experts], and over how many choices."""

    @abstractmethod
    def start(self) -> None:
        """Starts the thread; ready when it returns."""

    @abstractmethod
    def submit(self, job: Job) -> None: ...

    @abstractmethod
    def cancel(self, job: Job) -> None: ...

    @abstractmethod
    def between(self, do: Callable[[], Any]) -> Any:
        """Calls `do` while no pass runs, and gives what it returns. Blocks; not to be called from the engine's thread."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the thread. Jobs that aren't finished fail."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether its thread runs."""

    @property
    @abstractmethod
    def fatal(self) -> BaseException | None:
        """What it died of."""

    @property
    def trouble(self) -> str | None:
        """Why nothing is written any more; None if all is well."""
        if self.fatal is not None:
            return f"the engine died: {told(self.fatal)}"
        return None if self.alive else "the engine isn't running"

    @property
    def waiting(self) -> int:
        return sum(not job.started for job in self.jobs.values())

    @property
    def running(self) -> int:
        return sum(job.started for job in self.jobs.values())

    def watched(self, jobs: Sequence[Job]) -> bool:
        """Whether this pass' loads are summed up: some job wants its own, or it is the turn of the metrics."""
        self.passes += 1
        return any(j.watch for j in jobs) or self.passes % self.settings.watch_every == 0

    def take_failures(self, plan: BatchPlan, jobs: Sequence[Job]) -> None:
        """Marks the jobs whose way went wrong in a pass."""
        if not plan.failed:
            return
        first = next(iter(plan.failed.values()))
        log.error("a way failed", exc_info=first, extra={"facts": {"answers": len(plan.failed)}})
        for item, error in plan.failed.items():
            jobs[item].failure = f"the router or its experts failed: {told(error)}"

    def take_loads(self, plan: BatchPlan, jobs: Sequence[Job], phases: Sequence[str]) -> None:
        """Hands out what a watched pass summed up. phases: of each job "prompt" or "answer", or "" if its tokens don't count."""
        sizes = {id(j.route.version): len(j.route.version.pool) for j in jobs if j.route is not None}
        found = plan.loads.summed(len(jobs), sizes)
        for i, job in enumerate(jobs):
            if job.route is None or not phases[i]:
                continue
            weights, times = found.get(id(job.route.version), (None, None))
            if weights is None or times is None or not (n := int(times[i])):
                continue
            self.on_load(job, weights[i], n)
            if job.watch:
                job.add_load(phases[i], weights[i], n)
