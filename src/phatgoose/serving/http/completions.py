"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from phatgoose.errors import PhatgooseError, UnknownName
from phatgoose.serving.api.errors import APIError
from phatgoose.serving.api.schema import ChatRequest, CompletionRequest
from phatgoose.serving.engine.job import ENDING
from phatgoose.serving.engine.sampling import RULED_OUT
from phatgoose.serving.engine.text import shown
from phatgoose.serving.engine.text_stream import EngineFailure, Piece, Writer, all_pieces, whole
from phatgoose.serving.http.responses import Form, usage, usage_so_far
from phatgoose.serving.service import Ask, Service
from phatgoose.serving.threads import away

Body = ChatRequest | CompletionRequest
T = TypeVar("T")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No proxy keeps a stream back: nginx would, until its buffers are full."""
AT_ONCE = 2000
"""Log-probabilities, or tokens of prompts that are repeated, that are written on the event loop."""
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
UNREAD_SECONDS = 30.0
"""How long after a request's time is up its client may take to read what was written."""


async def answer(service: Service, request: Request, body: Body) -> Response:
    """An answer, whole or as a stream.

    Raises:
        APIError: the request can't be answered.
    """
    service.check_room(1)
    began = time.perf_counter()
    deadline = asyncio.get_running_loop().time() + service.settings.timeout_seconds
    stack = AsyncExitStack()
    try:
        ask = await _begin(service, request, body, stack, began, deadline)
        form = await _form(service, body, ask)
        stack.callback(_note, request, ask, body)
        if body.stream:
            return _Stream(_events(service, request, body, ask, form, deadline), stack, deadline)
    except BaseException:
        await stack.aclose()
        raise
    async with stack:
        return await _until_gone(service, request, _at_once(service, request, body, ask, form, deadline))


class _Stream(StreamingResponse):
    """Server-sent events; whatever happens to them, what they needed is given back, also if the client doesn't read them."""

    def __init__(self, events: AsyncGenerator[str, None], stack: AsyncExitStack, deadline: float):
        super().__init__(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        self.events, self.stack, self.deadline = events, stack, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stack, aclosing(self.events):
            with contextlib.suppress(TimeoutError):  # uvicorn closes a connection whose answer ends like this
                async with asyncio.timeout_at(self.deadline + UNREAD_SECONDS):
                    await super().__call__(scope, receive, send)


async def _begin(
    service: Service, request: Request, body: Body, stack: AsyncExitStack, began: float, deadline: float
) -> Ask:
    """Finds the model and hands over the jobs; leaving the stack takes off what isn't finished."""
    try:
        async with asyncio.timeout_at(deadline):
            found = await stack.enter_async_context(service.catalogue.found(body.model))
            prompts = await _until_gone(service, request, service.read(body))
            ask = await service.ask(found, body, prompts, began)
    except UnknownName as error:
        raise APIError(404, service.told(error)[:500], param="model", code="model_not_found") from None
    except PhatgooseError as error:
        raise APIError(400, service.told(error)[:500], param="model") from None
    except TimeoutError as error:
        raise _refused(error) from None

    def take_off() -> None:
        for writer in ask.writers:
            service.engine.cancel(writer.job)

    stack.callback(take_off)
    return ask


async def _form(service: Service, body: Body, ask: Ask) -> Form:
    chat, tokenizer = isinstance(body, ChatRequest), service.base.tokenizer
    echo: list[str] = []
    if isinstance(body, CompletionRequest) and body.echo:
        given = body.prompts
        make = partial(_texts, tokenizer, given)
        texts = await away(make) if sum(map(len, ask.prompts)) > AT_ONCE else make()
        echo = [text for text in texts for _ in range(body.n or 1)]
    name = body.model or (service.catalogue.name if ask.found.route is not None else "base")
    kind = "chatcmpl" if chat else "cmpl"
    return Form(f"{kind}-{uuid.uuid4().hex}", name, int(time.time()), body, tokenizer, echo)


def _texts(tokenizer: Any, prompts: Sequence[str | list[int]]) -> list[str]:
    return [p if isinstance(p, str) else shown(tokenizer, p) for p in prompts]


async def _at_once(
    service: Service, request: Request, body: Body, ask: Ask, form: Form, deadline: float
) -> Response:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(whole(writer, deadline)) for writer in ask.writers]
    except BaseExceptionGroup as errors:
        raise _refused(errors.exceptions[0]) from None
    pieces = [_cut(body, task.result(), writer) for task, writer in zip(tasks, ask.writers, strict=True)]
    content = await _off_the_loop(form, ask.writers, partial(_whole_body, form, ask, pieces))
    service.metrics.seconds.observe(time.perf_counter() - ask.began)
    return Response(content, media_type="application/json")


def _whole_body(form: Form, ask: Ask, pieces: Sequence[Piece]) -> bytes:
    """The response of all choices, written one by one: other threads wait while one of them is."""
    choices = [
        _json(form.choice(i, piece, writer))
        for i, (piece, writer) in enumerate(zip(pieces, ask.writers, strict=True))
    ]
    head, last = _json(form.head()), _json({"usage": usage(ask), **form.of_prompt(ask.writers[0])})
    return f'{head[:-1]}, "choices": [{", ".join(choices)}], {last[1:]}'.encode()


async def _off_the_loop(form: Form, writers: Sequence[Writer], do: Callable[[], T]) -> T:
    """What `do` makes of these answers; in a thread of its own if it is much, so that the event loop answers others."""
    return await away(do) if form.reported(writers) > AT_ONCE else do()


def _cut(body: Body, piece: Piece, writer: Writer) -> Piece:
    """Nothing of the token that was written because something must be, where only the prompt was asked for."""
    if not isinstance(body, CompletionRequest) or body.max_tokens != 0:
        return piece
    writer.tokens = 0
    return Piece("", (), piece.finish and "length", ())


async def _events(
    service: Service, request: Request, body: Body, ask: Ask, form: Form, deadline: float
) -> AsyncGenerator[str, None]:
    """Server-sent events."""
    counted = bool(body.stream_options and body.stream_options.include_usage)
    begun: set[int] = set()
    try:
        async with aclosing(all_pieces(ask.writers, deadline)) as pieces:
            async for index, piece in pieces:
                writer, first = ask.writers[index], index not in begun
                begun.add(index)
                make = partial(_chunk, form, index, _cut(body, piece, writer), writer, first=first)
                yield await _off_the_loop(form, [writer], make) if first else make()
        if counted:
            yield _event({**form.head(chunk=True), "choices": [], "usage": usage(ask)})
        service.metrics.seconds.observe(time.perf_counter() - ask.began)
    except (EngineFailure, TimeoutError) as error:
        request.state.facts["failed"] = type(error).__name__
        yield _event(_refused(error).body())
    except (asyncio.CancelledError, GeneratorExit):
        if not service.ended:
            _left(service, request)
        raise
    yield "data: [DONE]\n\n"


def _chunk(form: Form, index: int, piece: Piece, writer: Writer, *, first: bool) -> str:
    choice = form.chunk(index, piece, writer, first=first)
    more = form.of_prompt(writer) if first else {}
    options = form.request.stream_options
    if options is not None and options.include_usage:
        more |= {"usage": usage_so_far(writer) if options.continuous_usage_stats else None}
    return _event({**form.head(chunk=True), "choices": [choice], **more})


def _event(data: dict[str, Any]) -> str:
    return f"data: {_json(data)}\n\n"


def _json(data: dict[str, Any]) -> str:
    """Without what some clients take for the end of a line of a stream, though it may stand in JSON."""
    return json.dumps(data, ensure_ascii=False).translate(_LINE_ENDS)


async def _until_gone(service: Service, request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; broken off when the client leaves, which raises a APIError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        _left(service, request)
        raise APIError(499, "the client left.")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refused(error: BaseException) -> APIError:
    if isinstance(error, TimeoutError):
        return APIError(504, "the answer wasn't finished in time.", code="timeout")
    if isinstance(error, EngineFailure) and str(error) == ENDING:
        return APIError(503, f"{ENDING}.", code="server_ending", headers={"Retry-After": "5"})
    if isinstance(error, EngineFailure) and str(error) == RULED_OUT:
        return APIError(400, f"{RULED_OUT}.", param="allowed_token_ids")
    if isinstance(error, EngineFailure):
        return APIError(500, f"{error}.".replace("..", "."), code="engine_failure")
    raise error


def _note(request: Request, ask: Ask, body: Body) -> None:
    """Facts for the log: nothing of what was said."""
    firsts = [w.job.first_token - w.job.began for w in ask.writers if w.job.first_token is not None]
    request.state.facts |= {
        "kind": ask.found.kind,
        "answers": len(ask.writers),
        "prompt_tokens": sum(map(len, ask.prompts)),
        "answer_tokens": sum(writer.tokens for writer in ask.writers),
        "first_token_seconds": round(min(firsts), 4) if firsts else None,
        "stream": bool(body.stream),
    }


def _left(service: Service, request: Request) -> None:
    service.metrics.left.inc()
    request.state.facts["left"] = True
