"""What every request passes before a route sees it: keys, sizes, names; and what is written about it afterwards."""

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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phatgoose.serving.api.errors import APIError
from phatgoose.serving.logs import log
from phatgoose.serving.service import Service

OPEN = ("/health", "/ready")
"""Paths that need no key."""
ANSWERS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
PATHS = frozenset({"/health", "/ready", "/metrics", "/openapi.json", "/v1/models", *ANSWERS})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Keys:
    """Who may come in. Kept as digests, so that comparing takes the same time whatever the key."""

    api: tuple[bytes, ...] = ()
    """None: everybody may ask."""
    admin: tuple[bytes, ...] = ()
    """None: nobody may change anything."""

    @staticmethod
    def of(api: Collection[str] = (), admin: Collection[str] = ()) -> Keys:
        return Keys(tuple(map(_digest, api)), tuple(map(_digest, admin)))

    def check(self, path: str, given: str | None) -> None:
        """Raises a APIError, unless `given` opens `path`."""
        if path in OPEN:
            return
        administers = path == "/admin" or path.startswith("/admin/")
        if administers and not self.admin:
            raise APIError(403, "nothing can be changed: the server was started without an admin key.")
        wanted = self.admin if administers else self.api
        if not wanted:
            return
        digest = _digest(given or "")
        # Every key is compared, so that time doesn't tell which of them was near.
        fits = [hmac.compare_digest(digest, key) for key in wanted]
        if given is None or not any(fits):
            raise APIError(
                401, "the key is missing or wrong: send Authorization: Bearer KEY.", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """Middleware around all routes.

    Args:
        hosts: what the Host header may say; None: anything. Without a key, a page in a browser could otherwise reach a server on
            this machine under a name of its own.
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
        call = _Call(scope, receive, send, self.service)
        try:
            self._check(call)
            with self._place(call):
                await call.read()
                await self.app(scope, call.replay, call.send)
        except APIError as refusal:
            await call.refuse(refusal)
        except Exception as error:
            call.facts["error"] = type(error).__name__
            log.exception("failed", extra={"facts": {"id": call.id}})
            await call.refuse(APIError(500, "the server failed.", code="internal_error"))
        finally:
            call.finish()

    @contextlib.contextmanager
    def _place(self, call: _Call) -> Iterator[None]:
        """A request for answers has one at least, so more of them than there are places for answers needn't be read."""
        if call.path not in ANSWERS:
            yield
            return
        if self.service.draining:
            raise self.service.unready()
        if self.service.inside >= self.service.places:
            raise self.service.busy()
        self.service.inside += 1
        try:
            yield
        finally:
            self.service.inside -= 1

    def _check(self, call: _Call) -> None:
        if call.header(b"transfer-encoding") and call.header(b"content-length"):
            # A proxy may have gone by the one, and the server by the other: what follows would be another request.
            raise APIError(400, "a request has either Transfer-Encoding or Content-Length.")
        if self.hosts is not None:
            found = _HOST.fullmatch(call.header(b"host") or "")
            if found is None or found[1].lower() not in self.hosts:
                raise APIError(
                    403, "this server answers to local names only; start it with a key to change that."
                )
        if _CONTROL.search(
            call.path
        ):  # a route matches a path before a line's end, too, which is compared here
            raise APIError(404, "Not Found")
        given = call.header(b"authorization")
        scheme, _, key = (given or "").partition(" ")
        self.keys.check(call.path, key.strip() if scheme.lower() == "bearer" else None)
        if call.scope["method"] in ("POST", "PUT", "PATCH"):
            kind = (call.header(b"content-type") or "").partition(";")[0].strip().lower()
            if kind != "application/json" and not (call.path.startswith("/admin/") and not kind):
                raise APIError(415, "expected Content-Type: application/json.")
            coding = (call.header(b"content-encoding") or "identity").strip().lower()
            if coding != "identity":
                raise APIError(415, "compressed bodies aren't read: send it without Content-Encoding.")


class _Call:
    """One request on its way through."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, service: Service):
        self.scope, self._receive, self._send, self.service = scope, receive, send, service
        # As the routes see it, also where the server is below a path of its own.
        self.path = get_route_path(scope)
        self.headers = dict(scope["headers"])
        asked = self.header(b"x-request-id") or ""
        self.id = asked if _ID.fullmatch(asked) else uuid.uuid4().hex
        self.facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = self.facts
        self.began, self.status, self.begun = time.perf_counter(), 0, False
        self.body: bytes | None = None
        self.whole = not self.header(b"transfer-encoding") and self.header(b"content-length") in (None, "0")
        """Whether nothing more of the request is to come."""

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def read(self) -> None:
        """The whole body, if it isn't too long and doesn't take too long."""
        settings, length = self.service.settings, self.header(b"content-length")
        too_large = APIError(413, f"the request's body is larger than {settings.max_body_bytes} bytes.")
        if length is not None and length.isdigit() and int(length) > settings.max_body_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(settings.body_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise APIError(499, "the client left.")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > settings.max_body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        self.whole = True
                        break
        except TimeoutError:
            raise APIError(
                408, f"the request's body took longer than {settings.body_seconds:g} seconds."
            ) from None
        self.body = b"".join(parts)

    async def replay(self) -> Message:
        """The body at once, then whatever comes: that the client leaves."""
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            more = [(b"x-request-id", self.id.encode())]
            # What the client still sends isn't read, so the connection can't be used again.
            more += [] if self.whole else [(b"connection", b"close")]
            message = {**message, "headers": [*message["headers"], *more]}
        await self._send(message)

    async def refuse(self, refusal: APIError) -> None:
        if not self.begun:
            await refusal.response()(self.scope, self._receive, self.send)

    def finish(self) -> None:
        seconds = time.perf_counter() - self.began
        path = self.path if self.path in PATHS else "/admin" if self.path.startswith("/admin") else "other"
        self.service.metrics.requests.labels(path, str(self.status)).inc()
        facts = {"id": self.id, "method": self.scope["method"], "path": path, "status": self.status}
        log.info("request", extra={"facts": {**facts, "seconds": round(seconds, 4), **self.facts}})
