"""The web application: the page, and answers as lines of JSON while they are written."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from phatgoose.analysis.page import live_page
from phatgoose.errors import PhatgooseError
from phatgoose.ui.guard import Guard
from phatgoose.ui.queue import AnswerQueue, Busy, QueuedAnswer
from phatgoose.ui.session import Question, Session
from phatgoose.workflows.prompt_forms import common_form

_QUESTION = TypeAdapter(Question)


def make_app(session: Session) -> FastAPI:
    """GET / is the page. POST /answer takes a `Question` and gives the events of `Session.answer`, one per line."""
    html, policy = live_page(
        base=session.base.spec,
        pool=session.pool,
        places=session.locations,
        routers=list(session.routers.values()),
        chat=session.base.tokenizer.chat_template is not None,
        form=common_form(session.pool),
        most_new_tokens=session.limits.new_tokens,
    )
    queue = AnswerQueue(session.limits.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, body_bytes=session.limits.body_bytes)

    @app.get("/")
    async def page() -> Response:
        headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.post("/answer")
    async def answer(request: Request) -> Response:
        question = _QUESTION.validate_json(await request.body())
        session.check(question)
        return _Lines(queue, queue.submit(partial(session.answer, question)))

    @app.exception_handler(PhatgooseError)
    async def refused(request: Request, error: PhatgooseError) -> Response:
        if isinstance(error, Busy):
            return JSONResponse({"error": str(error)}, 429, {"Retry-After": "5"})
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(ValidationError)
    async def malformed(request: Request, error: ValidationError) -> Response:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        return JSONResponse({"error": f"{where or 'the request'}: {first['msg'][:300]}"}, 422)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    return app


class _Lines(StreamingResponse):
    """An answer's events as a response. Whatever ends the response also ends the answer."""

    def __init__(self, queue: AnswerQueue, queued: QueuedAnswer) -> None:
        self.queue, self.queued = queue, queued
        super().__init__(self._lines(), media_type="application/x-ndjson")

    async def _lines(self) -> AsyncIterator[bytes]:
        async for event in self.queue.events(self.queued):
            yield json.dumps(event, separators=(",", ":")).encode() + b"\n"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.queue.leave(self.queued)


def listen(port: int) -> socket.socket:
    """A socket that other machines can't reach; PhatgooseError if it can't be had. Port 0 takes any free one."""
    try:
        # It listens: clients that come before the server runs have to wait.
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise PhatgooseError(f"can't listen on port {port}: {why}. Give another with --port.") from error


def server(app: FastAPI) -> uvicorn.Server:
    """Runs the application: `server(app).run(sockets=[listen(port)])`."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False, server_header=False,
            limit_concurrency=64, timeout_graceful_shutdown=3,
        )
    )  # fmt: skip
