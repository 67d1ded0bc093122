"""What a job's tokens are as text: decoded, cut at stop strings, with their log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.engine.job import Job
from phatgoose.serving.engine.sampling import Likelihood
from phatgoose.serving.engine.text import Decoder, Stops

Finish = Literal["stop", "length"]


class EngineFailure(Exception):
    """The engine couldn't go on with a job."""


@dataclass(frozen=True)
class Piece:
    """More of an answer: text, its tokens with where in the answer they begin, and at the end why it ended."""

    text: str = ""
    likelihoods: tuple[tuple[int, Likelihood], ...] = ()
    finish: Finish | None = None
    tokens: tuple[int, ...] = ()
    """Those written since the last piece, also where their text is held back."""


class Writer:
    """One answer. Leaving `pieces` before the end takes the job off the engine."""

    def __init__(self, engine: Engine, tokenizer: Any, job: Job, stops: Sequence[str]):
        self.engine, self.job = engine, job
        self.tokens = 0
        """Written so far, those of a stop string included, not what was written after it."""
        self._decoder, self._stops = Decoder(tokenizer), Stops(stops)
        self._shown = 0
        self._held: list[tuple[int, Likelihood]] = []
        self._fresh: list[int] = []

    async def pieces(self, deadline: float | None = None) -> AsyncGenerator[Piece]:
        """The answer as it comes; the last piece alone says why it ended.

        Raises:
            EngineFailure: saying why. TimeoutError: it wasn't finished at `deadline`.
        """
        try:
            async for news in self.job.news(deadline):
                if news.error is not None:
                    raise EngineFailure(news.error)
                for token in news.tokens:
                    piece = self._push(token)
                    if self._stops.stopped:
                        yield self._last(piece, "stop")
                        return
                    if piece:
                        yield self._piece(piece)
                if news.finished:
                    ended = bool(self.job.written) and self.job.written[-1] in self.job.ends
                    rest = self._stops.push(self._decoder.rest())
                    rest += self._stops.rest()
                    yield self._last(rest, "stop" if ended or self._stops.stopped else "length")
                    return
        finally:
            self.engine.cancel(self.job)

    def _push(self, token: int) -> str:
        self.tokens += 1
        self._fresh.append(token)
        piece = self._decoder.push(token)
        if self.job.draw.settings.logprobs is not None:
            self._held.append((self._decoder.began, self.job.draw.likelihoods[self.tokens - 1]))
        # Stop strings are looked for behind the fewest tokens that were asked for.
        return piece if self.tokens <= self.job.draw.settings.min_tokens else self._stops.push(piece)

    def _piece(self, text: str) -> Piece:
        self._shown += len(text)
        ready = [one for one in self._held if not self._stops.strings or one[0] < self._shown]
        self._held = self._held[len(ready) :]
        return Piece(text, tuple(ready), None, self._taken())

    def _last(self, text: str, finish: Finish) -> Piece:
        shown = self._shown + len(text)
        left = [one for one in self._held if not self._stops.stopped or one[0] < shown]
        return Piece(text, tuple(left), finish, self._taken())

    def _taken(self) -> tuple[int, ...]:
        fresh, self._fresh = tuple(self._fresh), []
        return fresh


async def whole(writer: Writer, deadline: float | None) -> Piece:
    """All pieces as one."""
    async with aclosing(writer.pieces(deadline)) as pieces:
        found = [piece async for piece in pieces]
    likelihoods = tuple(one for piece in found for one in piece.likelihoods)
    tokens = tuple(token for piece in found for token in piece.tokens)
    return Piece("".join(piece.text for piece in found), likelihoods, found[-1].finish, tokens)


async def all_pieces(writers: Sequence[Writer], deadline: float | None) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with the number of its answer.

    Raises:
        EngineFailure, TimeoutError: of the first that fails; the others are taken off the engine.
    """
    if len(writers) == 1:
        async with aclosing(writers[0].pieces(deadline)) as only:
            async for piece in only:
                yield 0, piece
        return
    ready: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue(maxsize=len(writers) * 2)

    async def follow(number: int, writer: Writer) -> None:
        try:
            async with aclosing(writer.pieces(deadline)) as pieces:
                async for piece in pieces:
                    await ready.put((number, piece))
        except Exception as error:
            await ready.put((number, error))

    tasks = [asyncio.ensure_future(follow(i, w)) for i, w in enumerate(writers)]
    try:
        left = len(writers)
        while left:
            number, got = await ready.get()
            if isinstance(got, BaseException):
                raise got
            left -= got.finish is not None
            yield number, got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
