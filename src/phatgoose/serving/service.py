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
from phatgoose.models.base import Base
from phatgoose.models.limits import end_tokens
from phatgoose.serving import batches, continuous
from phatgoose.serving.catalogue import Catalogue, Found
from phatgoose.serving.changes import Changes
from phatgoose.serving.engine import Engine
from phatgoose.serving.experts import Experts
from phatgoose.serving.job import Job, ServingError, hide_paths
from phatgoose.serving.metrics import Metrics
from phatgoose.serving.prompts import Prompts
from phatgoose.serving.refusals import Refusal
from phatgoose.serving.sampling import Draw, Sampling
from phatgoose.serving.schema import ChatRequest, Common, CompletionRequest
from phatgoose.serving.settings import ServeSettings
from phatgoose.serving.writer import Writer


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
        backend_name: str = "auto",
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
            backend_name=backend_name,
            max_routers=self.settings.max_routers,
            encoder=self.settings.encoder,
        )
        self.changes, self.catalogue = Changes(self.experts, folder), Catalogue(self.experts, name)
        self.prompts, self.ends = Prompts(base), end_tokens(base.model, base.tokenizer.eos_token_id)
        self.created = int(time.time())
        self.draining = self.started = False
        self.failure: PhatgooseError | None = None
        """Why it couldn't start."""
        self._pool = pool
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ready when it returns.

        Raises:
            PhatgooseError: the pool can't be served on this base.
        """
        try:
            await self.changes.load(self._pool)
        except PhatgooseError as failure:
            self.failure = failure
            raise
        self._pool = None
        self.engine.start()
        if self.settings.follow_seconds is not None:
            self._following = asyncio.create_task(self.changes.follow(self.settings.follow_seconds))
        self.started = True

    async def stop(self) -> None:
        self.draining = True
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await asyncio.to_thread(self.engine.stop)
        self.engine.mixed.close()

    @property
    def obstacle(self) -> str | None:
        """Why requests aren't taken now; None if they are."""
        if not self.started:
            return "the server is starting"
        if self.draining:
            return "the server is ending"
        return self.engine.trouble

    def told(self, error: PhatgooseError) -> str:
        """What clients may hear of an error: nothing of where this machine keeps its files."""
        return hide_paths(str(error), self.changes.folder, self.base.spec, self.settings.encoder)

    def check_room(self, answers: int) -> None:
        """Refuses requests that nobody could get to in good time."""
        if (why := self.obstacle) is not None:
            raise Refusal(503, f"{why}.", headers={"Retry-After": "5"})
        if answers > self.settings.max_answers:
            raise Refusal(
                400, f"{answers} answers are asked for, and at most {self.settings.max_answers} are given to a request.", param="n"
            )  # fmt: skip
        if len(self.engine.jobs) + answers > self.places:
            raise self.busy()

    @property
    def places(self) -> int:
        """How many answers may be written or wait."""
        return self.settings.max_running + self.settings.max_waiting

    def busy(self) -> Refusal:
        return Refusal(
            429, "the server is busy: too many answers are waiting.", code="busy", headers={"Retry-After": str(self._wait())}
        )  # fmt: skip

    def _wait(self) -> int:
        """Seconds after which it makes sense to come again: about as long as a place takes to become free."""
        ages = [time.perf_counter() - job.began for job in self.engine.jobs.values() if job.started]
        return max(1, min(60, round(max(ages, default=1) / max(len(ages), 1))))

    async def read(self, request: Common) -> list[list[int]]:
        """The tokens of a request's prompts, one prompt after the other, so that it can be broken off between two.

        Raises:
            Refusal: there are too many, or one can't be read.
        """
        n = request.n or 1
        if isinstance(request, ChatRequest):
            self.check_room(n)
            return [await self.prompts.of_chat(request.messages)]
        assert isinstance(request, CompletionRequest)
        self.check_room(len(request.prompts) * n)
        if request.echo and self.base.is_encoder_decoder:
            raise Refusal(
                400, "echo: the prompt isn't a part of what an encoder–decoder writes.", param="echo"
            )
        return [await self.prompts.of_text(prompt) for prompt in request.prompts]

    def ask(self, found: Found, request: Common, prompts: list[list[int]], began: float) -> Ask:
        """The jobs of a request whose prompts were read, handed to the engine.

        Raises:
            Refusal: what is asked can't be written.
        """
        chat = isinstance(request, ChatRequest)
        score = request.logprobs if isinstance(request, CompletionRequest) and request.echo else None
        n = request.n or 1
        limits = [self.room(request, prompt, chat) for prompt in prompts]
        sampling = self.sampling(request)
        self.check_room(len(prompts) * n)
        writers = []
        for p, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            for i in range(n):
                job = Job(
                    prompt,
                    found.way,
                    Draw(sampling, p * n + i),
                    max(limit, 1),
                    self.ends,
                    watch=bool(request.phatgoose and request.phatgoose.experts),
                    score=score,
                    began=began,
                    heard=partial(self.metrics.heard, found.kind),
                )
                writers.append(Writer(self.engine, self.base.tokenizer, job, request.stops))
        for writer in writers:
            self.engine.submit(writer.job)
        return Ask(found, prompts, writers, began)

    def room(self, request: Common, prompt: Sequence[int], chat: bool) -> int:
        """How many tokens an answer may have.

        Raises:
            Refusal: more are asked for than are given, or than fit behind the prompt.
        """
        assert isinstance(request, ChatRequest | CompletionRequest)
        asked, name = request.max_tokens, "max_tokens"
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            asked, name = request.max_completion_tokens, "max_completion_tokens"
        if asked is None and not chat:
            asked = 16
        most, limit = self.settings.max_tokens, self.engine.limit
        if asked is not None and asked > most:
            raise Refusal(400, f"{name}: at most {most} tokens are written in an answer.", param=name)
        behind = None if limit is None else limit - len(prompt)
        if behind is not None and behind < (1 if asked is None else max(asked, 1)):
            raise Refusal(
                400,
                f"the prompt has {len(prompt)} tokens{f' and the answer may have {asked}' if asked else ''}; together "
                f"there is room for {limit}.",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        if asked is not None:
            return asked
        return most if behind is None else min(most, behind)

    def sampling(self, request: Common) -> Sampling:
        """A request's way of drawing tokens.

        Raises:
            Refusal: a token that the model doesn't have.
        """
        bias = {}
        for key, value in (request.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise Refusal(400, "logit_bias: its keys are token ids, whole numbers.", param="logit_bias")
            bias[int(key)] = value
        if bias:
            self.prompts.check(list(bias), "logit_bias")
        if isinstance(request, ChatRequest):
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
        else:
            assert isinstance(request, CompletionRequest)
            logprobs = request.logprobs
        return Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=bias,
            logprobs=logprobs,
        )


def engine_for(base: Base, settings: ServeSettings) -> Engine:
    """The engine that the settings ask for, or the first that can run this base.

    Raises:
        ServingError: continuous batching was asked for, and can't run it.
    """
    if settings.engine == "batches" or (settings.engine == "auto" and continuous.obstacle(base) is not None):
        return batches.BatchEngine(base, settings)
    return continuous.ContinuousEngine(base, settings)
