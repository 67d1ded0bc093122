"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from phatgoose import __version__
from phatgoose.errors import PhatgooseError, UnknownName
from phatgoose.models.text.encoding import decode_text
from phatgoose.serving.api.errors import APIError, from_validation_errors
from phatgoose.serving.api.schema import AddExpert, ChatRequest, CompletionRequest, Detokenize, Tokenize
from phatgoose.serving.http.completions import answer
from phatgoose.serving.http.guard import Guard, Keys
from phatgoose.serving.service import Service
from phatgoose.serving.threads import run_in_thread_async

T = TypeVar("T")
_ERROR = {"description": "Refused; `error.message` says why."}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = dict.fromkeys(
    (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504), _ERROR
)
_CONFLICT: dict[int | str, dict[str, Any]] = {409: _ERROR}


def make_app(service: Service, keys: Keys | None = None, hosts: Collection[str] | None = None) -> FastAPI:
    """The server as an ASGI application, whose lifespan starts and stops the service.

    Args:
        keys: who may send requests and who may change experts; None: everybody, and nobody.
        hosts: names by which the server may be called (see Guard); None: any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="phatgoose",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host and scheme that the client wrote, not the proxy's
        responses=ERROR_RESPONSES,
    )
    app.state.service = service
    app.add_middleware(Guard, service=service, keys=keys, hosts=hosts)
    _add_error(app, APIError, lambda error: error)
    _add_error(app, PhatgooseError, service.model_error)
    _add_error(app, RequestValidationError, lambda error: from_validation_errors(list(error.errors())))
    _add_error(app, HTTPException, _http_error)
    for add_routes in (_add_completions, _add_models, _add_tokenizer, _add_monitoring, _add_admin):
        add_routes(app, service)
    return app


def _add_error(app: FastAPI, kind: type[Exception], convert: Callable[[Any], APIError]) -> None:
    """Answers errors of this kind as OpenAI's clients expect it."""

    async def respond(_: Request, error: Exception) -> JSONResponse:
        return convert(error).response()

    app.add_exception_handler(kind, respond)


def _http_error(error: HTTPException) -> APIError:
    message = "the request's body is not JSON." if error.status_code == 400 else str(error.detail)
    return APIError(error.status_code, message, headers=error.headers)


def _add_get(app: FastAPI, path: str, do: Callable[..., Any], **more: Any) -> None:
    """Adds a route for GET and HEAD."""
    app.add_api_route(path, do, methods=["GET"], **more)
    app.add_api_route(path, do, methods=["HEAD"], include_in_schema=False, **more)


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(service, request, body)

    @app.post("/v1/completions", response_class=JSONResponse)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(service, request, body)


def _add_models(app: FastAPI, service: Service) -> None:
    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "phatgoose"}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.models.listed()]}

    async def one_model(name: str) -> dict[str, Any]:
        """A model that a request may name, listed or not."""
        if service.experts.binding >= service.capacity:
            raise service.busy_error()
        async with service.models.resolve(name):
            return model(name)

    _add_get(app, "/v1/models", models)
    _add_get(app, "/v1/models/{name:path}", one_model)


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    """vLLM's routes between text and tokens."""

    async def check_model(model: str | None) -> None:
        async with service.models.resolve(model or service.models.default):
            pass

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        """The tokens that a text, or a conversation, is read as."""
        await check_model(body.model)
        prompts = service.prompts
        if body.messages is not None:
            tokens = await prompts.encode_chat(body.messages)
        elif body.add_special_tokens is False:
            tokens = await prompts.encode_bare(body.prompt or "")
        else:
            tokens = await prompts.encode(body.prompt or "")
        strings = service.base.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return {"count": len(tokens), "max_model_len": prompts.limit, "tokens": tokens, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        """The text of tokens, special ones included."""
        await check_model(body.model)
        if body.tokens:
            service.prompts.check_tokens(body.tokens, "tokens")
        text = await run_in_thread_async(decode_text, service.base.tokenizer, body.tokens, special=True)
        return {"prompt": text}


def _add_monitoring(app: FastAPI, service: Service) -> None:
    def status(failure: str | None, well: str) -> Response:
        return JSONResponse({"status": failure or well}, 503 if failure else 200)

    async def health() -> Response:
        """Whether the process works. If not, restart it."""
        return status(service.engine.failure if service.started and not service.draining else None, "ok")

    async def ready() -> Response:
        """Whether requests are accepted."""
        return status(service.unready_reason, "ready")

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    _add_get(app, "/health", health)
    _add_get(app, "/ready", ready)
    _add_get(app, "/metrics", metrics, response_class=PlainTextResponse)


def _add_admin(app: FastAPI, service: Service) -> None:
    changes = service.changes

    async def made(change: Awaitable[T], *folders: str) -> T:
        """Makes a change. It is shielded: a client that leaves must not break it off halfway."""
        try:
            return await asyncio.shield(change)
        except PhatgooseError as error:
            status = 404 if isinstance(error, UnknownName) else 409
            raise APIError(status, service.client_message(error, *folders)[:1000]) from None

    @app.get("/admin/experts")
    async def experts() -> dict[str, Any]:
        return {"experts": changes.list_experts()}

    @app.post("/admin/experts", responses=_CONFLICT)
    async def add(body: AddExpert) -> dict[str, Any]:
        added = await made(changes.add(Path(body.folder), body.name), body.folder)
        return {"added": added, **await experts()}

    @app.delete("/admin/experts/{name}", responses=_CONFLICT)
    async def remove(name: str) -> dict[str, Any]:
        await made(changes.remove(name))
        return await experts()

    @app.post("/admin/experts/{name}/{state}", responses=_CONFLICT)
    async def switch(name: str, state: str) -> dict[str, Any]:
        if state not in ("on", "off"):
            raise APIError(404, f"there is no {state!r}: an expert is switched on or off.")
        await made(changes.switch(name, on=state == "on"))
        return await experts()

    @app.post("/admin/reload", responses=_CONFLICT)
    async def reload() -> dict[str, Any]:
        await made(changes.reload())
        return await experts()
