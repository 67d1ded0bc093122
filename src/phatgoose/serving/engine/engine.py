"""The engine's interface: jobs go in, updates come out; one thread runs the model."""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from phatgoose.models.base.base import Base
from phatgoose.models.batched.attach import MultiRouter
from phatgoose.models.batched.plan import BatchPlan, SequenceMemory
from phatgoose.models.batched.version import Route
from phatgoose.serving.engine.sampling import SequenceSampler, TokenLogprob
from phatgoose.serving.errors import client_message
from phatgoose.serving.logs import log
from phatgoose.serving.settings import ServeSettings

_numbers = itertools.count()


@dataclass(frozen=True)
class JobUpdate:
    """What happened to a job since its last update."""

    tokens: tuple[int, ...] = ()
    finished: bool = False
    error: str | None = None
    """Why it failed. Such an update is the last one."""


@dataclass(eq=False)
class GenerationJob:
    """One sequence to generate.

    It is made on the event loop. An engine reads it in its own thread, and calls `publish` on the loop. The fields
    below `id` are filled while the job runs.
    """

    prompt: Sequence[int]
    route: Route | None
    """None: the base alone."""
    sampler: SequenceSampler
    max_new_tokens: int
    end_tokens: frozenset[int]
    """Tokens that end the answer, of which they are the last."""
    track_experts: bool = False
    """Whether to fill `expert_loads`."""
    top_prompt_logprobs: int | None = None
    """How many of the likeliest tokens to report for each prompt token; None: no log-probabilities of the prompt."""
    arrived: float = field(default_factory=time.perf_counter)
    """When the request came, by time.perf_counter()."""
    on_tokens: Callable[[GenerationJob, int], None] = lambda job, tokens: None
    """Called with the number of new tokens, before they are in `output`."""
    id: str = field(default_factory=lambda: f"job-{next(_numbers)}")

    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """From the prompt's second token on."""
    expert_loads: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """By phase ("prompt", "answer"): the routing weight of each expert of the route's pool, float64 [experts], and the
    number of choices. Both are sums over modules and tokens."""
    tracked_tokens: int = 0
    """How many of its tokens are in `expert_loads`."""
    memory: SequenceMemory = field(default_factory=SequenceMemory)
    """What its route's router keeps of it between two passes."""
    started: bool = False
    """Whether a pass has processed any of its tokens."""
    error: str | None = None
    """Set by the engine when this job's route or sampling failed."""
    first_token_time: float | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _updates: asyncio.Queue[JobUpdate] = field(default_factory=asyncio.Queue)

    def __deepcopy__(self, memo: object) -> GenerationJob:
        # transformers copies a request's settings, which hold the job, when it restarts the request.
        return self

    def publish(self, update: JobUpdate) -> None:
        """Must be called on the event loop."""
        if update.tokens:
            self.first_token_time = self.first_token_time or time.perf_counter()
            self.on_tokens(self, len(update.tokens))
        self.output += update.tokens
        self._updates.put_nowait(update)

    async def updates(self, deadline: float | None = None) -> AsyncIterator[JobUpdate]:
        """The updates up to the last one; TimeoutError if none has come at `deadline`, by the loop's clock."""
        while True:
            async with asyncio.timeout_at(deadline):
                update = await self._updates.get()
            yield update
            if update.finished:
                return

    def add_load(self, phase: str, weights: Tensor, choices: int) -> None:
        if phase in self.expert_loads:
            before = self.expert_loads[phase]
            weights, choices = before[0] + weights, before[1] + choices
        self.expert_loads[phase] = weights, choices


class Engine(ABC):
    """Generates many jobs at once, each by its own route.

    `submit` and `cancel` are called on the event loop. A cancelled job gets no more updates.
    """

    limit: int | None
    """The most tokens of a prompt and its answer together; None: the model has no limit."""

    def __init__(self, base: Base, settings: ServeSettings):
        self.base, self.settings = base, settings
        self.multi_router = MultiRouter(base.model)
        self.jobs: dict[str, GenerationJob] = {}
        self.passes = 0
        self.on_load: Callable[[GenerationJob, Tensor, int], None] = lambda job, weights, choices: None
        """Called after tracked passes with a job, the experts' weights float64 [experts], and the number of choices."""

    @abstractmethod
    def start(self) -> None:
        """Starts the engine's thread. The engine is ready when this returns."""

    @abstractmethod
    def submit(self, job: GenerationJob) -> None: ...

    @abstractmethod
    def cancel(self, job: GenerationJob) -> None: ...

    @abstractmethod
    def run_between_passes(self, do: Callable[[], Any]) -> Any:
        """Calls `do` while no pass runs, and returns its result. It blocks; never call it from the engine's thread."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the thread. Unfinished jobs fail."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the engine's thread is running."""

    @property
    @abstractmethod
    def fatal_error(self) -> BaseException | None:
        """The error that ended the thread."""

    @property
    def failure(self) -> str | None:
        """Why nothing is generated any more; None while the engine works."""
        if self.fatal_error is not None:
            return f"the engine died: {client_message(self.fatal_error)}"
        return None if self.alive else "the engine isn't running"

    @property
    def waiting(self) -> int:
        return sum(not job.started for job in self.jobs.values())

    @property
    def running(self) -> int:
        return sum(job.started for job in self.jobs.values())

    def count_pass(self, jobs: Sequence[GenerationJob]) -> bool:
        """Counts a pass, and says whether its expert loads are tracked: for one of the jobs or for the metrics."""
        self.passes += 1
        return any(job.track_experts for job in jobs) or self.passes % self.settings.watch_every == 0

    def record_failures(self, plan: BatchPlan, jobs: Sequence[GenerationJob]) -> None:
        """Marks the jobs whose route failed in a pass."""
        if not plan.failed:
            return
        first = next(iter(plan.failed.values()))
        log.error("a route failed", exc_info=first, extra={"facts": {"answers": len(plan.failed)}})
        for item, error in plan.failed.items():
            jobs[item].error = f"the router or its experts failed: {client_message(error)}"

    def record_loads(self, plan: BatchPlan, jobs: Sequence[GenerationJob], phases: Sequence[str]) -> None:
        """Distributes a tracked pass's expert loads. `phases`: each job's "prompt" or "answer"; "" leaves it out."""
        by_version = plan.summed_loads()
        for i, (job, phase) in enumerate(zip(jobs, phases, strict=True)):
            if job.route is None or not phase or id(job.route.version) not in by_version:
                continue
            weights, choices = by_version[id(job.route.version)]
            if not (count := int(choices[i])):
                continue
            self.on_load(job, weights[i], count)
            if job.track_experts:
                job.add_load(phase, weights[i], count)
