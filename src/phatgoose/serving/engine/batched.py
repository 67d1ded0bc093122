"""The engine on generate(): one batch after the other, for models that continuous batching can't run.

Whoever waits when a batch is over makes up the next one, first come, first served.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from phatgoose.models.base.base import Base, context_length
from phatgoose.models.batched.plan import BatchPlan
from phatgoose.models.text.capabilities import generation_groups
from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.engine.generate_call import Batch
from phatgoose.serving.engine.job import ENDING, Job, News, ServingError, told
from phatgoose.serving.engine.sampling import likelihoods
from phatgoose.serving.logs import log
from phatgoose.serving.settings import ServeSettings

SCORED_ROWS = 512
"""Tokens of a prompt that are scored at once."""
GATHER_SECONDS = 0.01
"""How long the first that comes waits for others."""


class BatchEngine(Engine):
    """A cancelled job leaves its row at the next token; the batch is over when no row is left."""

    def __init__(self, base: Base, settings: ServeSettings):
        super().__init__(base, settings)
        self.limit = None if base.is_encoder_decoder else context_length(base.model)
        self._wakeups: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._fatal: BaseException | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="phatgoose-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        with self._lock:
            self._waiting.append(job)
        self._wakeups.put(None)

    def cancel(self, job: Job) -> None:
        self.jobs.pop(job.id, None)
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)

    def between(self, do: Callable[[], Any]) -> Any:
        if self._thread is None or not self._thread.is_alive():
            return do()
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(do())
            except BaseException as error:
                done.set_exception(error)

        self._wakeups.put(run)
        while True:
            with contextlib.suppress(TimeoutError):
                return done.result(timeout=1)
            if not self._thread.is_alive():
                raise ServingError(f"{self.trouble}.")

    def stop(self) -> None:
        self._stopping = True
        self._wakeups.put(None)
        if self._thread is not None:
            self._thread.join(timeout=30)
        for job in list(self.jobs.values()):
            self.tell(job, News(finished=True, error=ENDING))

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def fatal(self) -> BaseException | None:
        return self._fatal

    def step(self) -> None:
        """What others want done between two passes."""
        while not self._wakeups.empty():
            if (do := self._wakeups.get()) is not None:
                do()

    def wanted(self, job: Job) -> bool:
        """Whether somebody still waits for this one."""
        return job.id in self.jobs and not self._stopping

    def _loop(self) -> None:
        try:
            while not self._stopping:
                with self._lock:
                    idle = not self._waiting
                if idle:
                    if (do := self._wakeups.get()) is not None:
                        do()
                    time.sleep(GATHER_SECONDS)  # those that come together go together
                self.step()
                batch = self._next()
                if batch and not self._stopping:
                    self._run(batch)
        except BaseException as error:
            self._fatal = error
            for job in list(self.jobs.values()):
                self.tell(job, News(finished=True, error="the engine died"))
            raise

    def _next(self) -> list[Job]:
        """The first of those that wait, as many as may run and fit into the model's context side by side.

        Where the model would read padding, those whose prompts are as long as the first one's.
        """
        with self._lock:
            count, longest, most = 0, 0, 0
            for job in self._waiting[: self.settings.max_running]:
                longest, most = max(longest, len(job.prompt)), max(most, job.max_new_tokens)
                if count and self.limit is not None and longest + most > self.limit:
                    break
                count += 1
            prompts = [job.prompt for job in self._waiting[:count]]
            first = generation_groups(self.base.model, prompts, most)[0] if count else []
            batch = [self._waiting[place] for place in first]
            self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _run(self, jobs: list[Job]) -> None:
        try:
            with torch.no_grad():
                for job in jobs:
                    job.started = True
                if jobs := [job for job in jobs if job.score is None or self._scored(job)]:
                    Batch(self, jobs).run()
        except Exception as error:  # of the model or a router: the next batch may fare better
            log.exception("a batch failed", extra={"facts": {"answers": len(jobs)}})
            for job in jobs:
                self.tell(job, News(finished=True, error=told(error)))

    def tell(self, job: Job, news: News) -> None:
        """From the engine's thread; the jobs are the event loop's."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            job.loop.call_soon_threadsafe(self._hear, job, news)

    def _hear(self, job: Job, news: News) -> None:
        if job.id in self.jobs:
            if news.finished:
                del self.jobs[job.id]
            job.tell(news)

    def _scored(self, job: Job) -> bool:
        """Whether the prompt could be scored; if not, the job is told, and the others go on without it."""
        try:
            self._score(job)
        except Exception as error:
            log.exception("a prompt couldn't be scored")
            self.tell(job, News(finished=True, error=told(error)))
            return False
        return True

    def _score(self, job: Job) -> None:
        assert job.score is not None
        ids = torch.tensor([list(job.prompt)], device=self.base.device)
        with self.multi_router.following(BatchPlan([job.route], texts=[(tuple(job.prompt), ())])):
            logits = self.base.model(input_ids=ids, use_cache=False).logits[0, :-1]
        following = list(job.prompt[1:])
        for first in range(
            0, len(following), SCORED_ROWS
        ):  # whole, the scores of a long prompt would be there twice
            rows = slice(first, first + SCORED_ROWS)
            job.prompt_likelihoods += likelihoods(logits[rows].cpu(), following[rows], job.score)
