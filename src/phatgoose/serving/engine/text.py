"""An answer's tokens as text: decoded while they come, and cut at stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from phatgoose.models.text.decoding import IncrementalDecoder
from phatgoose.models.text.encoding import decode_text
from phatgoose.serving.engine.engine import Engine, GenerationJob
from phatgoose.serving.engine.sampling import TokenLogprob

FinishReason = Literal["stop", "length"]


def token_offsets(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """Where each of its tokens begins in `text`; all tokens of one character begin where the character does."""
    whole = decode_text(tokenizer, ids, special=True)
    # Special tokens that the text spells out are in it; those that the tokenizer itself puts before a text aren't.
    special = whole.endswith(text)
    before = len(whole) - len(text) if special else 0
    decoder, offsets = IncrementalDecoder(tokenizer, special=special), []
    for token in ids:
        decoder.push(token)
        offsets.append(min(max(decoder.token_start - before, 0), len(text)))
    return offsets


class StopStrings:
    """Looks for stop strings in text that comes in parts. It holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]):
        self.strings, self.stopped, self._held = strings, False, ""

    def push(self, part: str) -> str:
        """The text that may be shown now: nothing from the first stop string on."""
        if self.stopped:
            return ""
        text = self._held + part
        found = min((at for s in self.strings if (at := text.find(s)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        cut = len(text) - max((_overlap(text, s) for s in self.strings), default=0)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text that was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class EngineFailure(Exception):
    """The engine couldn't finish a job."""


@dataclass(frozen=True)
class Delta:
    """The next part of an answer."""

    text: str = ""
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    """(where in the answer the token begins, its log-probability)"""
    finish_reason: FinishReason | None = None
    """Set in the last delta."""
    tokens: tuple[int, ...] = ()
    """The tokens written since the last delta, including those whose text is held back."""


class TextStream:
    """One answer as text. Leaving `deltas` before the end cancels its job."""

    def __init__(self, engine: Engine, tokenizer: Any, job: GenerationJob, stops: Sequence[str]):
        self.engine, self.job = engine, job
        self.token_count = 0
        """Tokens written, including those of a stop string, but not those that the engine wrote after it."""
        self._decoder, self._stops = IncrementalDecoder(tokenizer), StopStrings(stops)
        self._shown = 0
        self._held_logprobs: list[tuple[int, TokenLogprob]] = []
        self._new_tokens: list[int] = []

    async def deltas(self, deadline: float | None = None) -> AsyncGenerator[Delta]:
        """The answer while it is written. Only the last delta has a finish reason. Raises EngineFailure: with the
        reason. TimeoutError: the answer wasn't finished at `deadline`."""
        try:
            async for update in self.job.updates(deadline):
                if update.error is not None:
                    raise EngineFailure(update.error)
                for token in update.tokens:
                    text = self._push(token)
                    if self._stops.stopped:
                        yield self._delta(text, "stop")
                        return
                    if text:
                        yield self._delta(text)
                if update.finished:
                    rest = self._stops.push(self._decoder.flush()) + self._stops.flush()
                    output = self.job.output
                    ended = bool(output) and output[-1] in self.job.end_tokens
                    yield self._delta(rest, "stop" if ended or self._stops.stopped else "length")
                    return
        finally:
            self.engine.cancel(self.job)

    def _push(self, token: int) -> str:
        self.token_count += 1
        self._new_tokens.append(token)
        text = self._decoder.push(token)
        sampler = self.job.sampler
        if sampler.params.logprobs is not None:
            self._held_logprobs.append((self._decoder.token_start, sampler.logprobs[self.token_count - 1]))
        # Stop strings are looked for only behind the first min_tokens tokens.
        return text if self.token_count <= sampler.params.min_tokens else self._stops.push(text)

    def _delta(self, text: str, reason: FinishReason | None = None) -> Delta:
        """The next delta. Log-probabilities wait for their token's text, which may turn out to be a stop string's."""
        self._shown += len(text)
        show_all = not self._stops.stopped if reason else not self._stops.strings
        ready = tuple(one for one in self._held_logprobs if show_all or one[0] < self._shown)
        self._held_logprobs = self._held_logprobs[len(ready) :]
        tokens, self._new_tokens = tuple(self._new_tokens), []
        return Delta(text, ready, reason, tokens)


async def collect(stream: TextStream, deadline: float | None) -> Delta:
    """The whole answer as one delta."""
    async with aclosing(stream.deltas(deadline)) as deltas:
        parts = [delta async for delta in deltas]
    logprobs = tuple(one for part in parts for one in part.logprobs)
    tokens = tuple(token for part in parts for token in part.tokens)
    return Delta("".join(part.text for part in parts), logprobs, parts[-1].finish_reason, tokens)


async def merge_streams(
    streams: Sequence[TextStream], deadline: float | None
) -> AsyncGenerator[tuple[int, Delta]]:
    """The deltas of several answers as they come, each with its answer's index. Raises the first EngineFailure or
    TimeoutError, which cancels the others."""
    # One answer needs no queue, in which it would run ahead of what was sent: its `token_count` goes with each delta.
    if len(streams) == 1:
        async with aclosing(streams[0].deltas(deadline)) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue(maxsize=len(streams) * 2)

    async def follow(index: int, stream: TextStream) -> None:
        try:
            async with aclosing(stream.deltas(deadline)) as deltas:
                async for delta in deltas:
                    await queue.put((index, delta))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.ensure_future(follow(i, stream)) for i, stream in enumerate(streams)]
    try:
        open_streams = len(streams)
        while open_streams:
            index, got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            open_streams -= got.finish_reason is not None
            yield index, got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
