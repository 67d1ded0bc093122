"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from phatgoose import __version__
from phatgoose.errors import PhatgooseError, UnknownName
from phatgoose.serving.api.errors import APIError, from_validation_errors
from phatgoose.serving.api.schema import AddExpert, ChatRequest, CompletionRequest, Detokenize, Tokenize
from phatgoose.serving.engine.text import shown
from phatgoose.serving.http.completions import answer
from phatgoose.serving.http.guard import Guard, Keys
from phatgoose.serving.service import Service
from phatgoose.serving.threads import away

_ERROR = {"description": "Refused; `error.message` says why."}
REFUSED: dict[int | str, dict[str, Any]] = dict.fromkeys(
    (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504), _ERROR
)


def make_app(service: Service, keys: Keys | None = None, hosts: Collection[str] | None = None) -> FastAPI:
    """The whole interface, as an ASGI application whose lifespan starts and ends the service.

    Args:
        keys: who may ask and who may change things; None: everybody asks, nobody changes.
        hosts: names under which the server may be asked for (Guard); None: any.
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
        redirect_slashes=False,  # a redirect would name the host and scheme that a client wrote, not the proxy's
        responses=REFUSED,
    )
    app.state.service = service
    app.add_middleware(Guard, service=service, keys=keys, hosts=hosts)
    _errors(app)
    _answers(app, service)
    _tokens(app, service)
    _operation(app, service)
    _admin(app, service)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def refused(_: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation_errors(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        message = "the request's body is not JSON." if error.status_code == 400 else str(error.detail)
        return APIError(error.status_code, message, headers=error.headers).response()


def _answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(service, request, body)

    @app.post("/v1/completions", response_class=JSONResponse)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(service, request, body)

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "phatgoose"}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.catalogue.models()]}

    async def one_model(name: str) -> dict[str, Any]:
        """Whatever a request may name, listed or not."""
        if service.experts.being_bound >= service.places:
            raise service.busy()
        try:
            async with service.catalogue.found(name):
                return model(name)
        except UnknownName:
            why = f"there is no model {name[:256]!r}."
        except PhatgooseError as error:
            why = service.told(error)[:500]
        raise APIError(404, why, param="model", code="model_not_found")

    _get(app, "/v1/models", models)
    _get(app, "/v1/models/{name:path}", one_model)


def _tokens(app: FastAPI, service: Service) -> None:
    """vLLM's routes between text and tokens."""

    @contextlib.asynccontextmanager
    async def known(model: str | None) -> AsyncIterator[None]:
        try:
            async with service.catalogue.found(model or service.catalogue.default):
                yield
        except UnknownName as error:
            raise APIError(404, service.told(error)[:500], param="model", code="model_not_found") from None
        except PhatgooseError as error:
            raise APIError(400, service.told(error)[:500], param="model") from None

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        """The tokens that a text, or a conversation, is read as."""
        prompts = service.prompts
        async with known(body.model):
            if body.messages is not None:
                found = await prompts.of_chat(body.messages)
            elif body.add_special_tokens is False:
                found = await prompts.bare(body.prompt or "")
            else:
                found = await prompts.of_text(body.prompt or "")
        strings = service.base.tokenizer.convert_ids_to_tokens(found) if body.return_token_strs else None
        return {"count": len(found), "max_model_len": prompts.most, "tokens": found, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        """The text of tokens, special ones too."""
        async with known(body.model):
            if body.tokens:
                service.prompts.check(body.tokens, "tokens")
            return {"prompt": await away(shown, service.base.tokenizer, body.tokens)}


def _get(app: FastAPI, path: str, do: Callable[..., Any], **more: Any) -> None:
    """A route for GET and HEAD."""
    app.add_api_route(path, do, methods=["GET"], **more)
    app.add_api_route(path, do, methods=["HEAD"], include_in_schema=False, **more)


def _operation(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        """Whether the process works; if not, it is to be restarted."""
        trouble = service.engine.trouble if service.started and not service.draining else None
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    async def ready() -> Response:
        """Whether requests are taken."""
        why = service.obstacle
        return JSONResponse({"status": why or "ready"}, 503 if why else 200)

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    _get(app, "/health", health)
    _get(app, "/ready", ready)
    _get(app, "/metrics", metrics, response_class=PlainTextResponse)


def _admin(app: FastAPI, service: Service) -> None:
    @contextlib.contextmanager
    def said(*folders: str) -> Any:
        try:
            yield
        except UnknownName as error:
            raise APIError(404, service.told(error, *folders)[:500]) from None
        except PhatgooseError as error:
            raise APIError(409, service.told(error, *folders)[:1000]) from None

    def listed() -> dict[str, Any]:
        return {"experts": service.changes.listed()}

    @app.get("/admin/experts")
    async def experts() -> dict[str, Any]:
        return listed()

    @app.post("/admin/experts", responses={409: _ERROR})
    async def add(body: AddExpert) -> dict[str, Any]:
        with said(body.folder):
            added = await asyncio.shield(service.changes.add(Path(body.folder), body.name))
        return {"added": added, **listed()}

    @app.delete("/admin/experts/{name}", responses={409: _ERROR})
    async def remove(name: str) -> dict[str, Any]:
        with said():
            await asyncio.shield(service.changes.remove(name))
        return listed()

    @app.post("/admin/experts/{name}/{state}", responses={409: _ERROR})
    async def switch(name: str, state: str) -> dict[str, Any]:
        if state not in ("on", "off"):
            raise APIError(404, f"there is no {state!r}: an expert is switched on or off.")
        with said():
            await asyncio.shield(service.changes.switch(name, on=state == "on"))
        return listed()

    @app.post("/admin/reload", responses={409: _ERROR})
    async def reload() -> dict[str, Any]:
        with said():
            await asyncio.shield(service.changes.reload())
        return listed()
