"""Everything behind the routes: a base, an engine, experts, and which requests are accepted."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phatgoose.errors import PhatgooseError, UnknownName
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base, decoder_start, end_tokens
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import ChatOrCompletion, ChatRequest
from phatgoose.serving.engine.batched import BatchEngine
from phatgoose.serving.engine.continuous import ContinuousEngine, obstacle
from phatgoose.serving.engine.engine import Engine, GenerationJob, JobUpdate
from phatgoose.serving.engine.sampling import SamplingParams, SequenceSampler
from phatgoose.serving.engine.text import TextStream
from phatgoose.serving.errors import SHUTTING_DOWN, ServingError, hide_paths
from phatgoose.serving.metrics import Metrics
from phatgoose.serving.pool.changes import PoolChanges
from phatgoose.serving.pool.versions import ModelNames, ResolvedModel, ServedExperts
from phatgoose.serving.requests import (
    Prompts,
    check_encoder_decoder,
    check_reported,
    max_new_tokens,
    sampling_params,
    top_prompt_logprobs,
)
from phatgoose.serving.settings import ServeSettings


@dataclass
class Generation:
    """The answers to one request: prompts × n streams, prompt by prompt."""

    model: ResolvedModel
    prompts: list[list[int]]
    streams: list[TextStream]


class Service:
    """A server without its HTTP. It lives on one event loop, between `start` and `stop`.

    Args:
        pool: the first experts; None: those of the folder, if there is one.
        folder: the pool's folder, where changes are kept.
    """

    def __init__(
        self,
        base: Base,
        settings: ServeSettings | None = None,
        *,
        pool: Pool | None = None,
        folder: Path | None = None,
        router: str = "phatgoose",
        name: str = "phatgoose",
        options: RouteOptions | None = None,
    ):
        self.base, self.settings = base, settings or ServeSettings()
        if base.tokenizer.eos_token_id is None:
            raise ServingError(
                f"the tokenizer of {base.spec} has no end-of-sequence token: set tokenizer.eos_token."
            )
        self.engine = make_engine(base, self.settings)
        self.metrics = Metrics(self.engine)
        self.experts = ServedExperts(self.engine, router, options)
        self.changes, self.models = PoolChanges(self.experts, folder), ModelNames(self.experts, name)
        self.prompts = Prompts(base, self.engine.limit or self.settings.max_prompt_tokens)
        self.end_tokens = end_tokens(base.model, base.tokenizer.eos_token_id)
        self.created = int(time.time())
        self.started = False
        self.draining = False
        """Whether new requests are refused because the server is ending."""
        self.ended = False
        """Whether unfinished answers were broken off."""
        self.open_requests = 0
        """Requests for answers that are being read or answered."""
        self.start_error: PhatgooseError | None = None
        self._pool = pool
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the engine, and has it write an answer. Raises PhatgooseError if it can't, or can't serve the pool."""
        try:
            await self.changes.load(self._pool)
            self._pool = None
            self.engine.start()
            await self._warm_up()
        except PhatgooseError as error:
            self.start_error = error
            await self.stop()
            raise
        if self.settings.follow_seconds is not None:
            self._following = asyncio.create_task(self.changes.follow(self.settings.follow_seconds))
        self.started = True

    async def _warm_up(self) -> None:
        """Writes one token as the default model: what is made on first use, as the cache, is made now, or fails now."""
        async with self.models.resolve(self.models.default) as model:
            sampler = SequenceSampler(SamplingParams(temperature=0))
            job = GenerationJob([min(self.end_tokens)], model.route, sampler, 1, frozenset())
            self.engine.submit(job)
            async for update in job.updates():
                if update.error is not None:
                    why = await self._explain_failure(update.error)
                    raise ServingError(f"the server can't answer anything: {why}.")
        await asyncio.to_thread(self.prompts.check_length, "", "prompt")

    async def _explain_failure(self, error: str) -> str:
        """Why the first answer failed. An engine that dies fails its jobs a moment before it says why."""
        for _ in range(50):
            if (cause := self.engine.fatal_error) is not None:
                return f"{type(cause).__name__}: {cause}"
            await asyncio.sleep(0.02)
        return error

    def break_off(self) -> None:
        """Ends all unfinished answers, and tells their clients that the server ends."""
        self.draining = self.ended = True
        for job in list(self.engine.jobs.values()):
            self.engine.cancel(job)
            job.publish(JobUpdate(finished=True, error=SHUTTING_DOWN))

    async def stop(self) -> None:
        self.break_off()
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await asyncio.to_thread(self.engine.stop)
        self.engine.multi_router.close()

    @property
    def unready_reason(self) -> str | None:
        """Why requests aren't accepted now; None if they are."""
        if not self.started:
            return "the server is starting"
        if self.draining:
            return "the server is ending"
        return self.engine.failure

    @property
    def capacity(self) -> int:
        """How many answers may be written or wait."""
        return self.settings.max_running + self.settings.max_waiting

    def client_message(self, error: PhatgooseError, *folders: str) -> str:
        """An error's message without the places where this machine keeps its files."""
        known = (self.changes.folder, self.base.spec, self.settings.encoder)
        return hide_paths(str(error), *folders, *known)

    def model_error(self, error: PhatgooseError) -> APIError:
        """The response to a request for a model that there isn't (404), or that can't be served (400)."""
        status, code = (404, "model_not_found") if isinstance(error, UnknownName) else (400, None)
        return APIError(status, self.client_message(error)[:500], param="model", code=code)

    def check_capacity(self, answers: int) -> None:
        """Refuses requests that wouldn't be answered in good time."""
        if self.unready_reason is not None:
            raise self.unready_error()
        if answers > (most := min(self.settings.max_answers, self.capacity)):
            why = f"{answers} answers are asked for, and at most {most} are given to a request."
            raise APIError(400, why, param="n")
        if len(self.engine.jobs) + answers > self.capacity:
            raise self.busy_error()

    def unready_error(self) -> APIError:
        return APIError(503, f"{self.unready_reason}.", headers={"Retry-After": "5"})

    def busy_error(self) -> APIError:
        # About as long as it takes until a running answer is finished.
        ages = [time.perf_counter() - job.arrived for job in self.engine.jobs.values() if job.started]
        seconds = max(1, min(60, round(max(ages, default=1) / max(len(ages), 1))))
        why = "the server is busy: too many answers are waiting."
        return APIError(429, why, code="busy", headers={"Retry-After": str(seconds)})

    async def encode_prompts(self, request: ChatOrCompletion) -> list[list[int]]:
        """The tokens of a request's prompts, one after the other, so that it can be broken off between two. Raises
        APIError: there are too many prompts, or one can't be read."""
        n = request.n or 1
        check_encoder_decoder(request, self.base)
        if isinstance(request, ChatRequest):
            self.check_capacity(n)
            return [await self.prompts.encode_chat(request.messages)]
        self.check_capacity(len(request.prompts) * n)
        encoded = []
        for prompt in request.prompts:
            encoded.append(await self.prompts.encode(prompt))
            # Checks the length now: otherwise all the other prompts would be read for nothing.
            max_new_tokens(request, encoded[-1], self.settings, self.engine.limit)
        return encoded

    async def generate(
        self, model: ResolvedModel, request: ChatOrCompletion, prompts: list[list[int]], arrived: float
    ) -> Generation:
        """Hands a request's jobs to the engine. Raises APIError if it can't be answered."""
        n, top = request.n or 1, top_prompt_logprobs(request)
        limits = [max_new_tokens(request, prompt, self.settings, self.engine.limit) for prompt in prompts]
        params = await sampling_params(request, self.prompts, self.end_tokens, min(limits))
        ends = frozenset(request.stop_token_ids or ())
        ends |= frozenset() if request.ignore_eos else self.end_tokens
        check_reported(request, params, n * sum(map(len, prompts)), n * sum(limits))
        self.check_capacity(len(prompts) * n)
        streams = []
        for branch in range(len(prompts) * n):
            prompt, limit = prompts[branch // n], limits[branch // n]
            # The tokens before an answer, where the model writes it.
            before = (decoder_start(self.base.model),) if self.base.is_encoder_decoder else prompt
            job = GenerationJob(
                prompt,
                model.route,
                SequenceSampler(params, branch, before),
                max(limit, 1),
                ends,
                track_experts=bool(request.phatgoose and request.phatgoose.experts),
                top_prompt_logprobs=top,
                arrived=arrived,
                on_tokens=partial(self.metrics.count_tokens, model.kind),
            )
            streams.append(TextStream(self.engine, self.base.tokenizer, job, request.stops))
        for stream in streams:
            self.engine.submit(stream.job)
        return Generation(model, prompts, streams)


def make_engine(base: Base, settings: ServeSettings) -> Engine:
    """The engine that the settings name (ServingError if it can't run this base), or the first that can."""
    if settings.engine == "batches" or (settings.engine == "auto" and obstacle(base) is not None):
        return BatchEngine(base, settings)
    return ContinuousEngine(base, settings)
