"""Everything behind the routes: a base, an engine, experts, and who may still come in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phatgoose.errors import PhatgooseError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base, decoder_start, end_tokens
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import AnswerRequest, ChatRequest, CompletionRequest
from phatgoose.serving.asking import check_prompt, check_reported, room, sampling_of, scored
from phatgoose.serving.engine import batched as batches
from phatgoose.serving.engine import continuous
from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.engine.job import ENDING, Job, News, ServingError, hide_paths
from phatgoose.serving.engine.sampling import Draw, Sampling
from phatgoose.serving.engine.text_stream import Writer
from phatgoose.serving.metrics import Metrics
from phatgoose.serving.pool.changes import Changes
from phatgoose.serving.pool.names import Catalogue, Found
from phatgoose.serving.pool.versions import Experts
from phatgoose.serving.prompts import Prompts
from phatgoose.serving.settings import ServeSettings


@dataclass
class Ask:
    """One request, ready to be written: prompts × n writers, prompt by prompt."""

    found: Found
    prompts: list[list[int]]
    writers: list[Writer]
    began: float
    """When the request came, by time.perf_counter()."""


class Service:
    """Lives on one event loop; `start` and `stop` are its lifespan.

    Args:
        pool: the first experts; None: those of the folder, if there is one.
        folder: where changes are kept.
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
        self.engine = engine_for(base, self.settings)
        self.metrics = Metrics(self.engine)
        self.experts = Experts(
            base,
            self.engine,
            router=router,
            options=options,
            max_routers=self.settings.max_routers,
            encoder=self.settings.encoder,
        )
        self.changes, self.catalogue = Changes(self.experts, folder), Catalogue(self.experts, name)
        self.prompts = Prompts(base, self.engine.limit or self.settings.max_prompt_tokens)
        self.ends = end_tokens(base.model, base.tokenizer.eos_token_id)
        self.created = int(time.time())
        self.draining = self.ended = self.started = False
        """Whether nobody new comes in any more, and whether what was begun was broken off."""
        self.inside = 0
        """Requests for answers that are being read or answered."""
        self.failure: PhatgooseError | None = None
        """Why it couldn't start."""
        self._pool = pool
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ready when it returns: it has written an answer then.

        Raises:
            PhatgooseError: the pool can't be served on this base, or nothing can be written.
        """
        try:
            await self.changes.load(self._pool)
            self._pool = None
            self.engine.start()
            await self._try()
        except PhatgooseError as failure:
            self.failure = failure
            await self.stop()
            raise
        if self.settings.follow_seconds is not None:
            self._following = asyncio.create_task(self.changes.follow(self.settings.follow_seconds))
        self.started = True

    async def _try(self) -> None:
        """Writes one token as the default model: what is made on first use, as the cache, is there then, or can't be made."""
        async with self.catalogue.found(self.catalogue.default) as found:
            job = Job([min(self.ends)], found.route, Draw(Sampling(temperature=0)), 1, frozenset())
            self.engine.submit(job)
            async for news in job.news():
                if news.error is not None:
                    raise ServingError(f"the server can't answer anything: {await self._cause(news.error)}.")
        await asyncio.to_thread(self.prompts.check_length, "", "prompt")

    async def _cause(self, error: str) -> str:
        """What a first answer failed of, for whoever starts the server: an engine that dies tells its jobs before it says why."""
        for _ in range(50):
            if (cause := self.engine.fatal) is not None:
                return f"{type(cause).__name__}: {cause}"
            await asyncio.sleep(0.02)
        return error

    def give_up(self) -> None:
        """Tells everybody whose answer isn't finished that the server ends."""
        self.draining = self.ended = True
        for job in list(self.engine.jobs.values()):
            self.engine.cancel(job)
            job.tell(News(finished=True, error=ENDING))

    async def stop(self) -> None:
        self.give_up()
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await asyncio.to_thread(self.engine.stop)
        self.engine.multi_router.close()

    @property
    def obstacle(self) -> str | None:
        """Why requests aren't taken now; None if they are."""
        if not self.started:
            return "the server is starting"
        if self.draining:
            return "the server is ending"
        return self.engine.trouble

    def told(self, error: PhatgooseError, *folders: str) -> str:
        """What clients may hear of an error: nothing of where this machine keeps its files."""
        known = (self.changes.folder, self.base.spec, self.settings.encoder)
        return hide_paths(str(error), *folders, *known)

    def check_room(self, answers: int) -> None:
        """Refuses requests that nobody could get to in good time."""
        if self.obstacle is not None:
            raise self.unready()
        if answers > (most := min(self.settings.max_answers, self.places)):
            raise APIError(
                400, f"{answers} answers are asked for, and at most {most} are given to a request.", param="n"
            )  # fmt: skip
        if len(self.engine.jobs) + answers > self.places:
            raise self.busy()

    @property
    def places(self) -> int:
        """How many answers may be written or wait."""
        return self.settings.max_running + self.settings.max_waiting

    def unready(self) -> APIError:
        return APIError(503, f"{self.obstacle}.", headers={"Retry-After": "5"})

    def busy(self) -> APIError:
        return APIError(
            429, "the server is busy: too many answers are waiting.", code="busy", headers={"Retry-After": str(self._wait())}
        )  # fmt: skip

    def _wait(self) -> int:
        """Seconds after which it makes sense to come again: about as long as a place takes to become free."""
        ages = [time.perf_counter() - job.began for job in self.engine.jobs.values() if job.started]
        return max(1, min(60, round(max(ages, default=1) / max(len(ages), 1))))

    async def read(self, request: AnswerRequest) -> list[list[int]]:
        """The tokens of a request's prompts, one prompt after the other, so that it can be broken off between two.

        Raises:
            APIError: there are too many, or one can't be read.
        """
        n = request.n or 1
        check_prompt(request, self.base)
        if isinstance(request, ChatRequest):
            self.check_room(n)
            return [await self.prompts.of_chat(request.messages)]
        assert isinstance(request, CompletionRequest)
        self.check_room(len(request.prompts) * n)
        found = []
        for prompt in request.prompts:
            found.append(await self.prompts.of_text(prompt))
            room(request, found[-1], self.settings, self.engine.limit)  # or all of them are read for nothing
        return found

    async def ask(self, found: Found, request: AnswerRequest, prompts: list[list[int]], began: float) -> Ask:
        """The jobs of a request whose prompts were read, handed to the engine.

        Raises:
            APIError: what is asked can't be written.
        """
        n, score = request.n or 1, scored(request)
        limits = [room(request, prompt, self.settings, self.engine.limit) for prompt in prompts]
        sampling = await sampling_of(request, self.prompts, self.ends, min(limits))
        ends = frozenset() if request.ignore_eos else self.ends
        ends |= frozenset(request.stop_token_ids or ())
        check_reported(request, sampling, n * sum(map(len, prompts)), n * sum(limits))
        self.check_room(len(prompts) * n)
        writers = []
        for p, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            for i in range(n):
                job = Job(
                    prompt,
                    found.route,
                    Draw(sampling, p * n + i, self._before(prompt)),
                    max(limit, 1),
                    ends,
                    watch=bool(request.phatgoose and request.phatgoose.experts),
                    score=score,
                    began=began,
                    heard=partial(self.metrics.heard, found.kind),
                )
                writers.append(Writer(self.engine, self.base.tokenizer, job, request.stops))
        for writer in writers:
            self.engine.submit(writer.job)
        return Ask(found, prompts, writers, began)

    def _before(self, prompt: list[int]) -> Sequence[int]:
        """What stands before an answer where the model writes it."""
        return (decoder_start(self.base.model),) if self.base.is_encoder_decoder else prompt


def engine_for(base: Base, settings: ServeSettings) -> Engine:
    """The engine that the settings ask for, or the first that can run this base.

    Raises:
        ServingError: continuous batching was asked for, and can't run it.
    """
    if settings.engine == "batches" or (settings.engine == "auto" and continuous.obstacle(base) is not None):
        return batches.BatchEngine(base, settings)
    return continuous.ContinuousEngine(base, settings)
