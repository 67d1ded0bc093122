"""Check every request before a route sees it (key, host, size), and log it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phatgoose.serving.api.errors import APIError
from phatgoose.serving.logs import log
from phatgoose.serving.service import Service

OPEN_PATHS = ("/health", "/ready")
"""Paths that need no key."""
ANSWER_PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
LOGGED_PATHS = frozenset({*OPEN_PATHS, "/metrics", "/openapi.json", "/v1/models", *ANSWER_PATHS})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Keys:
    """The keys that open the server, as digests: comparing those takes equally long for every key."""

    api: tuple[bytes, ...] = ()
    """Empty: everybody may send requests."""
    admin: tuple[bytes, ...] = ()
    """Empty: nobody may change experts."""

    @staticmethod
    def of(api: Collection[str] = (), admin: Collection[str] = ()) -> Keys:
        return Keys(tuple(map(_digest, api)), tuple(map(_digest, admin)))

    def check(self, path: str, given: str | None) -> None:
        """Raises an APIError unless `given` opens `path`."""
        if path in OPEN_PATHS:
            return
        is_admin = path == "/admin" or path.startswith("/admin/")
        if is_admin and not self.admin:
            raise APIError(403, "nothing can be changed: the server was started without an admin key.")
        wanted = self.admin if is_admin else self.api
        if not wanted:
            return
        digest = _digest(given or "")
        # Compare with every key, so that the time doesn't tell which of them was close.
        matches = [hmac.compare_digest(digest, key) for key in wanted]
        if given is None or not any(matches):
            why = "the key is missing or wrong: send Authorization: Bearer KEY."
            raise APIError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """Middleware around all routes.

    Args:
        hosts: what the Host header may say; None: anything. Without a key, a page in a browser could otherwise reach a
            server on this machine under a name of its own (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, service: Service, keys: Keys | None = None, hosts: Collection[str] | None = None
    ):
        self.app, self.service, self.keys = app, service, keys or Keys()
        self.hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.service)
        try:
            self._check_head(exchange)
            with self._take_place(exchange.path):
                await exchange.read_body()
                await self.app(scope, exchange.receive, exchange.send)
        except APIError as error:
            await exchange.send_error(error)
        except Exception as error:
            exchange.facts["error"] = type(error).__name__
            log.exception("failed", extra={"facts": {"id": exchange.id}})
            await exchange.send_error(APIError(500, "the server failed.", code="internal_error"))
        finally:
            exchange.finish()

    @contextlib.contextmanager
    def _take_place(self, path: str) -> Iterator[None]:
        """Limits how many requests for answers are read: each asks for one at least, of which only so many may wait."""
        if path not in ANSWER_PATHS:
            yield
            return
        if self.service.draining:
            raise self.service.unready_error()
        if self.service.open_requests >= self.service.capacity:
            raise self.service.busy_error()
        self.service.open_requests += 1
        try:
            yield
        finally:
            self.service.open_requests -= 1

    def _check_head(self, exchange: _Exchange) -> None:
        headers, path = exchange.headers, exchange.path
        if headers.get("transfer-encoding") and headers.get("content-length"):
            # A proxy may have used one and the server the other: what follows would be another request (smuggling).
            raise APIError(400, "a request has either Transfer-Encoding or Content-Length.")
        if self.hosts is not None:
            host = _HOST.fullmatch(headers.get("host", ""))
            if host is None or host[1].lower() not in self.hosts:
                raise APIError(
                    403, "this server answers to local names only; start it with a key to change that."
                )
        # A route also matches a path followed by a newline, but `Keys.check` compares whole paths.
        if _CONTROL.search(path):
            raise APIError(404, "Not Found")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        self.keys.check(path, key.strip() if scheme.lower() == "bearer" else None)
        if exchange.scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and not (path.startswith("/admin/") and not kind):
                raise APIError(415, "expected Content-Type: application/json.")
            if (headers.get("content-encoding") or "identity").strip().lower() != "identity":
                raise APIError(415, "compressed bodies aren't read: send it without Content-Encoding.")


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, service: Service):
        self.scope, self._receive, self._send, self.service = scope, receive, send, service
        # The path as the routes see it, also if the server is mounted below another path.
        self.path = get_route_path(scope)
        # Of a header that is sent twice, the last counts: a proxy appends its own to the client's.
        self.headers = dict(Headers(scope=scope).items())
        request_id = self.headers.get("x-request-id", "")
        self.id = request_id if _ID.fullmatch(request_id) else uuid.uuid4().hex
        self.facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = self.facts
        self.arrived, self.status, self.response_begun = time.perf_counter(), 0, False
        self.body: bytes | None = None
        self.is_read = (
            not self.headers.get("transfer-encoding") and self.headers.get("content-length", "0") == "0"
        )
        """Whether the client sends nothing more."""

    async def read_body(self) -> None:
        """Reads the whole body. Raises APIError: it is too long, takes too long, or the client leaves."""
        settings, length = self.service.settings, self.headers.get("content-length", "")
        too_large = APIError(413, f"the request's body is larger than {settings.max_body_bytes} bytes.")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(settings.body_seconds):
                async for part in Request(self.scope, self._receive).stream():
                    body += part
                    if len(body) > settings.max_body_bytes:
                        raise too_large
        except ClientDisconnect:
            raise APIError(499, "the client left.") from None
        except TimeoutError:
            why = f"the request's body took longer than {settings.body_seconds:g} seconds."
            raise APIError(408, why) from None
        self.is_read, self.body = True, bytes(body)

    async def receive(self) -> Message:
        """The body as one message, then whatever comes: that the client disconnects."""
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.response_begun, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            if not self.is_read:
                # The rest of the request won't be read, so the connection can't be used again.
                headers["connection"] = "close"
        await self._send(message)

    async def send_error(self, error: APIError) -> None:
        if not self.response_begun:
            await error.response()(self.scope, self._receive, self.send)

    def finish(self) -> None:
        """Counts and logs the request."""
        path = self.path
        if path not in LOGGED_PATHS:
            path = "/admin" if path.startswith("/admin") else "other"
        self.service.metrics.requests.labels(path, str(self.status)).inc()
        facts = {"id": self.id, "method": self.scope["method"], "path": path, "status": self.status}
        seconds = round(time.perf_counter() - self.arrived, 4)
        log.info("request", extra={"facts": {**facts, "seconds": seconds, **self.facts}})
