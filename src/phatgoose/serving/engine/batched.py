"""The engine on generate(), for models that continuous batching can't run.

It runs one batch after the other. Jobs that wait when a batch is over form the next one, first come, first served.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import StoppingCriteriaList

from phatgoose.models.base.base import Base, context_length, decoder_start
from phatgoose.models.batched.plan import BatchPlan, SequenceMemory
from phatgoose.models.text.batch import pad_id
from phatgoose.models.text.capabilities import generation_groups
from phatgoose.models.text.generate import generation_settings, run_generate
from phatgoose.serving.engine.engine import Engine, GenerationJob, JobUpdate
from phatgoose.serving.engine.sampling import sample_batch, token_logprobs
from phatgoose.serving.errors import SHUTTING_DOWN, ServingError, client_message
from phatgoose.serving.logs import log
from phatgoose.serving.settings import ServeSettings

SCORED_ROWS = 512
"""Prompt tokens that are scored at once."""
GATHER_SECONDS = 0.01
"""How long the first job of a batch waits for others."""


class BatchEngine(Engine):
    """A cancelled job leaves its row at the next token. The batch is over when no row is left."""

    fatal_error: BaseException | None = None

    def __init__(self, base: Base, settings: ServeSettings):
        super().__init__(base, settings)
        self.limit = None if base.is_encoder_decoder else context_length(base.model)
        self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        """Calls to make between two passes."""
        self._waiting: list[GenerationJob] = []
        """Touched by the engine's thread alone."""
        self._thread = threading.Thread(target=self._loop, name="phatgoose-engine", daemon=True)
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: GenerationJob) -> None:
        self.jobs[job.id] = job
        self._calls.put(partial(self._waiting.append, job))

    def cancel(self, job: GenerationJob) -> None:
        self.jobs.pop(job.id, None)

    def run_between_passes(self, do: Callable[[], Any]) -> Any:
        if not self.alive:
            return do()
        done: Future[Any] = Future()

        def call() -> None:
            try:
                done.set_result(do())
            except BaseException as error:
                done.set_exception(error)

        self._calls.put(call)
        while True:
            with contextlib.suppress(TimeoutError):
                return done.result(timeout=1)
            if not self.alive:  # it died before it made the call
                raise ServingError(f"{self.failure}.")

    def stop(self) -> None:
        self._stopping = True
        self._calls.put(lambda: None)  # wakes the thread
        if self.alive:
            self._thread.join(timeout=30)
        self._fail(list(self.jobs.values()), SHUTTING_DOWN)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def is_wanted(self, job: GenerationJob) -> bool:
        """Whether a client still waits for this job."""
        return job.id in self.jobs and not self._stopping

    def make_calls(self) -> None:
        """Makes the calls of `run_between_passes`, and takes in new jobs. To be called in the engine's thread."""
        while not self._calls.empty():
            self._calls.get()()
        self._waiting[:] = [job for job in self._waiting if self.is_wanted(job)]

    def publish(self, job: GenerationJob, update: JobUpdate) -> None:
        """Sends an update from the engine's thread to the event loop, where the jobs are."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody listens any more
            job.loop.call_soon_threadsafe(self._publish_on_loop, job, update)

    def _publish_on_loop(self, job: GenerationJob, update: JobUpdate) -> None:
        if job.id in self.jobs:
            if update.finished:
                del self.jobs[job.id]
            job.publish(update)

    def _fail(self, jobs: list[GenerationJob], error: str) -> None:
        for job in jobs:
            self.publish(job, JobUpdate(finished=True, error=error))

    def _loop(self) -> None:
        try:
            while not self._stopping:
                if not self._waiting:
                    self._calls.get()()
                    time.sleep(GATHER_SECONDS)  # so that requests that come together share a batch
                self.make_calls()
                if self._waiting:
                    self._run_batch(self._take_batch())
        except BaseException as error:
            self.fatal_error = error
            self._fail(list(self.jobs.values()), "the engine died")
            raise

    def _take_batch(self) -> list[GenerationJob]:
        """The first waiting jobs, as many as may run at once and fit side by side into the model's context.

        If padding would change the model's results, only those whose prompts are as long as the first one's.
        """
        count, longest, most = 0, 0, 0
        for job in self._waiting[: self.settings.max_running]:
            longest, most = max(longest, len(job.prompt)), max(most, job.max_new_tokens)
            if count and self.limit is not None and longest + most > self.limit:
                break
            count += 1
        prompts = [job.prompt for job in self._waiting[:count]]
        batch = [self._waiting[row] for row in generation_groups(self.base.model, prompts, most)[0]]
        self._waiting[:] = [job for job in self._waiting if job not in batch]
        return batch

    def _run_batch(self, jobs: list[GenerationJob]) -> None:
        try:
            with torch.no_grad():
                for job in jobs:
                    job.started = True
                if jobs := [job for job in jobs if self._score_prompt(job)]:
                    _GenerateCall(self, jobs).run()
        except Exception as error:  # of the model or a router; the next batch may succeed
            log.exception("a batch failed", extra={"facts": {"answers": len(jobs)}})
            self._fail(jobs, client_message(error))

    def _score_prompt(self, job: GenerationJob) -> bool:
        """Fills the job's `prompt_logprobs`, if it wants them. If that fails, only this job does: returns False."""
        if job.top_prompt_logprobs is None:
            return True
        try:
            ids = torch.tensor([list(job.prompt)], device=self.base.device)
            with self.multi_router.following(
                BatchPlan([job.route], texts=[(tuple(job.prompt), ())], memories=[SequenceMemory()])
            ):
                logits = self.base.model(input_ids=ids, use_cache=False).logits[0, :-1]
            following = list(job.prompt[1:])
            # In parts: the log-probabilities of a long prompt's whole vocabulary would need the memory again.
            for start in range(0, len(following), SCORED_ROWS):
                rows = slice(start, start + SCORED_ROWS)
                job.prompt_logprobs += token_logprobs(
                    logits[rows].cpu(), following[rows], job.top_prompt_logprobs
                )
        except Exception as error:
            log.exception("a prompt couldn't be scored")
            self._fail([job], client_message(error))
            return False
        return True


class _GenerateCall(LogitsProcessor):
    """One call of generate() for several jobs, each with its own route, sampling and end.

    It is its own logits processor, which chooses all tokens. Rows end one by one: at an end token, at their own length,
    or when their client has left.
    """

    def __init__(self, engine: BatchEngine, jobs: list[GenerationJob]):
        self.engine, self.jobs = engine, jobs
        self.open = [True] * len(jobs)
        self._output: list[list[int]] = [[] for _ in jobs]
        self._plan = self._next_plan()

    def run(self) -> None:
        """Writes all answers, in the engine's thread."""
        base = self.engine.base
        # No end token here: each job has its own, which _publish_token looks for.
        longest = max(job.max_new_tokens for job in self.jobs)
        own = generation_settings(base.model, pad=pad_id(base.tokenizer), max_new_tokens=longest)
        prompts = [job.prompt for job in self.jobs]
        with self.engine.multi_router.following(self._plan):
            run_generate(
                base.model,
                prompts,
                own,
                logits_processor=LogitsProcessorList([self]),
                stopping_criteria=StoppingCriteriaList([self._ended_rows]),
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Chooses and publishes each open row's next token; scores [B, V] → scores that allow no other token."""
        self._record_pass()
        # Calls between two passes, as calibrating a router, must see the base alone.
        self.engine.multi_router.plan = None
        self.engine.make_calls()
        self.open = [o and self.engine.is_wanted(job) for o, job in zip(self.open, self.jobs, strict=True)]
        rows = [i for i, is_open in enumerate(self.open) if is_open]
        tokens, failed = sample_batch(scores[rows].float(), [self.jobs[i].sampler for i in rows])
        chosen = torch.zeros(len(self.jobs), 1, dtype=torch.long)
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            chosen[row] = token
            self._publish_token(row, token, failed.get(place))
        self._plan = self.engine.multi_router.plan = self._next_plan()
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.to(scores.device), 0.0)

    def _ended_rows(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ~torch.tensor(self.open, device=input_ids.device)

    def _record_pass(self) -> None:
        engine, plan = self.engine, self._plan
        plan.keep_memories()
        if plan.count_loads:
            phase = "answer" if any(self._output) else "prompt"
            engine.record_loads(plan, self.jobs, [phase if is_open else "" for is_open in self.open])
        engine.record_failures(plan, self.jobs)
        for row in plan.failed or ():
            self.open[row] = False
            engine.publish(self.jobs[row], JobUpdate(finished=True, error=self.jobs[row].error))

    def _publish_token(self, row: int, token: int, error: Exception | None) -> None:
        job, output = self.jobs[row], self._output[row]
        output.append(token)
        over = token in job.end_tokens or len(output) >= job.max_new_tokens
        self.open[row] = error is None and not over
        update = JobUpdate((token,), over) if error is None else JobUpdate(finished=True, error=str(error))
        self.engine.publish(job, update)

    def _next_plan(self) -> BatchPlan:
        texts = None
        if any(job.route is not None and job.route.reads_text for job in self.jobs):
            texts = [(tuple(job.prompt), self._read_before(i)) for i, job in enumerate(self.jobs)]
        # A row that is over falls back to the base: its route's experts may have left the model by now.
        routes = [job.route if is_open else None for is_open, job in zip(self.open, self.jobs, strict=True)]
        memories = [job.memory for job in self.jobs]
        return BatchPlan(
            routes, count_loads=self.engine.count_pass(self.jobs), texts=texts, memories=memories, failed={}
        )

    def _read_before(self, row: int) -> tuple[int, ...]:
        """What was read behind a row's prompt before the next pass, which reads the last token written."""
        if not self._output[row]:
            return ()
        base = self.engine.base
        start = (decoder_start(base.model),) if base.is_encoder_decoder else ()
        return (*start, *self._output[row][:-1])
