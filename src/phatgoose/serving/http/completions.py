"""Answer /v1/chat/completions and /v1/completions, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from phatgoose.models.text.encoding import decode_text
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import ChatOrCompletion, ChatRequest, CompletionRequest
from phatgoose.serving.engine.sampling import RULED_OUT
from phatgoose.serving.engine.text import Delta, EngineFailure, TextStream, collect, merge_streams
from phatgoose.serving.errors import SHUTTING_DOWN
from phatgoose.serving.http.responses import ResponseFormat, count_logprobs
from phatgoose.serving.service import Generation, Service
from phatgoose.serving.threads import run_in_thread_async

T = TypeVar("T")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Without the second one, nginx keeps a stream back until its buffers are full."""
MAX_ON_LOOP = 2000
"""The most log-probabilities, or tokens of repeated prompts, that are formatted on the event loop."""
UNREAD_SECONDS = 30.0
"""How long after a request's deadline its client may take to read what was written."""
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class _Call:
    """One HTTP request on its way to an answer."""

    service: Service
    request: Request
    body: ChatOrCompletion
    arrived: float
    """By time.perf_counter(), for the metrics."""
    deadline: float
    """By the event loop's clock."""


async def answer(service: Service, request: Request, body: ChatOrCompletion) -> Response:
    """Answers a request. Raises APIError: the request can't be answered. PhatgooseError: its model can't be served."""
    service.check_capacity(1)
    deadline = asyncio.get_running_loop().time() + service.settings.timeout_seconds
    call = _Call(service, request, body, time.perf_counter(), deadline)
    # Holds what must be given back, whatever happens: the experts' pin, the jobs, the facts for the log.
    async with AsyncExitStack() as stack:
        generation = await _begin(call, stack)
        response_format = await _response_format(call, generation)
        stack.callback(_log_facts, call, generation)
        if body.stream:
            return _Stream(_events(call, response_format), stack.pop_all(), deadline)
        return await _until_disconnect(call, _whole_response(call, response_format))


class _Stream(StreamingResponse):
    """Server-sent events. What they hold is given back in any case, also if the client doesn't read them."""

    def __init__(self, events: AsyncGenerator[str, None], stack: AsyncExitStack, deadline: float):
        super().__init__(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        self.events, self.stack, self.deadline = events, stack, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stack, aclosing(self.events):
            with contextlib.suppress(TimeoutError):  # uvicorn closes the connection of an unfinished answer
                async with asyncio.timeout_at(self.deadline + UNREAD_SECONDS):
                    await super().__call__(scope, receive, send)


async def _begin(call: _Call, stack: AsyncExitStack) -> Generation:
    """Resolves the model and submits the jobs. Leaving the stack cancels those that aren't finished."""
    service, body = call.service, call.body
    try:
        async with asyncio.timeout_at(call.deadline):
            model = await stack.enter_async_context(service.models.resolve(body.model))
            prompts = await _until_disconnect(call, service.encode_prompts(body))
            generation = await service.generate(model, body, prompts, call.arrived)
    except TimeoutError as error:
        raise _api_error(error) from None
    for stream in generation.streams:
        stack.callback(service.engine.cancel, stream.job)
    return generation


async def _response_format(call: _Call, generation: Generation) -> ResponseFormat:
    service, body, tokenizer = call.service, call.body, call.service.base.tokenizer
    echo: list[str] = []
    if isinstance(body, CompletionRequest) and body.echo:
        prompts = body.prompts

        def texts() -> list[str]:
            return [p if isinstance(p, str) else decode_text(tokenizer, p, special=True) for p in prompts]

        is_large = sum(map(len, generation.prompts)) > MAX_ON_LOOP
        echo = [text for text in await _run(texts, is_large) for _ in range(body.n or 1)]
    name = body.model or (service.models.name if generation.model.route is not None else "base")
    answer_id = f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
    return ResponseFormat(answer_id, name, int(time.time()), body, tokenizer, generation, echo)


async def _run(do: Callable[[], T], is_large: bool) -> T:
    """Large work runs in a thread, so that the event loop can serve others."""
    return await run_in_thread_async(do) if is_large else do()


async def _whole_response(call: _Call, response_format: ResponseFormat) -> Response:
    streams = response_format.generation.streams
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(stream, call.deadline)) for stream in streams]
    except BaseExceptionGroup as errors:
        raise _api_error(errors.exceptions[0]) from None
    deltas = [
        _without_token(call.body, task.result(), stream) for task, stream in zip(tasks, streams, strict=True)
    ]
    write = partial(_whole_body, response_format, deltas)
    content = await _run(write, count_logprobs(streams) > MAX_ON_LOOP)
    call.service.metrics.seconds.observe(time.perf_counter() - call.arrived)
    return Response(content, media_type="application/json")


def _whole_body(response_format: ResponseFormat, deltas: list[Delta]) -> bytes:
    # The choices are written one by one: json.dumps holds the GIL, so other threads wait while it runs.
    choices = ", ".join(_json(response_format.choice(i, delta)) for i, delta in enumerate(deltas))
    prompt = response_format.prompt_fields(0) if response_format.chat else {}
    head, last = _json(response_format.head()), _json({"usage": response_format.usage(), **prompt})
    return f'{head[:-1]}, "choices": [{choices}], {last[1:]}'.encode()


def _without_token(body: ChatOrCompletion, delta: Delta, stream: TextStream) -> Delta:
    """Drops the answer if max_tokens is 0. The engine always writes a token, but only the prompt was asked for."""
    if body.max_tokens != 0:
        return delta
    stream.token_count = 0
    return Delta(finish_reason=delta.finish_reason and "length")


async def _events(call: _Call, response_format: ResponseFormat) -> AsyncGenerator[str, None]:
    """The server-sent events of a stream."""
    streams, options = response_format.generation.streams, call.body.stream_options
    begun: set[int] = set()
    try:
        async with aclosing(merge_streams(streams, call.deadline)) as deltas:
            async for index, delta in deltas:
                stream, first = streams[index], index not in begun
                begun.add(index)
                delta = _without_token(call.body, delta, stream)
                write = partial(_chunk, response_format, index, delta, first=first)
                # Only the first chunk can be large: it brings the prompt's log-probabilities.
                yield await _run(write, first and count_logprobs([stream]) > MAX_ON_LOOP)
        if options and options.include_usage:
            head = response_format.head(chunk=True)
            yield _event({**head, "choices": [], "usage": response_format.usage()})
        call.service.metrics.seconds.observe(time.perf_counter() - call.arrived)
    except (EngineFailure, TimeoutError) as error:
        call.request.state.facts["failed"] = type(error).__name__
        yield _event(_api_error(error).body())
    except (asyncio.CancelledError, GeneratorExit):
        if not call.service.ended:
            _count_disconnect(call)
        raise
    yield "data: [DONE]\n\n"


def _chunk(response_format: ResponseFormat, index: int, delta: Delta, *, first: bool) -> str:
    choice = response_format.choice(index, delta, chunk=True, first=first)
    more = response_format.prompt_fields(index) if first and response_format.chat else {}
    options = response_format.request.stream_options
    if options is not None and options.include_usage:
        more |= {"usage": response_format.usage(index) if options.continuous_usage_stats else None}
    return _event({**response_format.head(chunk=True), "choices": [choice], **more})


def _event(data: dict[str, Any]) -> str:
    return f"data: {_json(data)}\n\n"


def _json(data: dict[str, Any]) -> str:
    """JSON in which the characters are escaped that some clients take for the end of a stream's line."""
    return json.dumps(data, ensure_ascii=False).translate(_LINE_ENDS)


async def _until_disconnect(call: _Call, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects; that raises an APIError."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnect(call.request))
    try:
        await asyncio.wait([task, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        _count_disconnect(call)
        raise APIError(499, "the client left.")
    finally:
        for one in (task, disconnect):
            one.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _api_error(error: BaseException) -> APIError:
    """The response to a timeout or a failure of the engine; any other error is raised."""
    if isinstance(error, TimeoutError):
        return APIError(504, "the answer wasn't finished in time.", code="timeout")
    if not isinstance(error, EngineFailure):
        raise error
    if str(error) == SHUTTING_DOWN:
        return APIError(503, f"{SHUTTING_DOWN}.", code="server_ending", headers={"Retry-After": "5"})
    if str(error) == RULED_OUT:
        return APIError(400, f"{RULED_OUT}.", param="allowed_token_ids")
    return APIError(500, f"{error}.".replace("..", "."), code="engine_failure")


def _log_facts(call: _Call, generation: Generation) -> None:
    """Adds facts about the answer to the request's line in the log, none about what was said."""
    jobs = [stream.job for stream in generation.streams]
    waited = [job.first_token_time - job.arrived for job in jobs if job.first_token_time is not None]
    call.request.state.facts |= {
        "kind": generation.model.kind,
        "answers": len(jobs),
        "prompt_tokens": sum(map(len, generation.prompts)),
        "answer_tokens": sum(stream.token_count for stream in generation.streams),
        "first_token_seconds": round(min(waited), 4) if waited else None,
        "stream": bool(call.body.stream),
    }


def _count_disconnect(call: _Call) -> None:
    call.service.metrics.left.inc()
    call.request.state.facts["left"] = True
