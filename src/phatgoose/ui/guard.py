"""Keep other sites and other machines out of a server on this machine.

A page from elsewhere can send requests here, and even read the answers if its own name is given our address
(DNS rebinding). So the Host must be this machine's own name, a question must come from our own page or from no
page at all, as JSON, and responses can't be framed, embedded or cached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOOPBACK = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    b"cache-control": b"no-store",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}


class Guard:
    """An ASGI middleware that refuses requests before the application sees them."""

    def __init__(self, app: App, body_bytes: int) -> None:
        self.app, self.body_bytes = app, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = {name for name, _ in message.get("headers", ())}
                more = [pair for pair in _HEADERS.items() if pair[0] not in sent]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        if scope["type"] != "http":  # a web socket; there are none here
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := self._refusal(scope)) is not None:
            await _refuse(guarded, *refusal)
        else:
            await self.app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and reason of a refusal, or None."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not _LOOPBACK.fullmatch(hosts[0]):
            return 421, "this server answers to localhost and 127.0.0.1 only."
        if scope["method"] in ("GET", "HEAD"):
            return None
        origins, sites = headers.get("origin", []), headers.get("sec-fetch-site", [])
        if any(origin.lower() != f"http://{hosts[0]}".lower() for origin in origins) or any(
            site not in ("same-origin", "none") for site in sites
        ):
            return 403, "questions are taken from this server's own page only."
        if [value.partition(";")[0].strip().lower() for value in headers.get("content-type", [])] != [
            "application/json"
        ]:
            return 415, "expected content-type application/json."
        lengths = headers.get("content-length", [])
        # A chunked body has any length, whatever the content-length says.
        if "transfer-encoding" in headers or len(lengths) != 1 or not re.fullmatch(r"\d{1,18}", lengths[0]):
            return 411, "expected one content-length."
        if int(lengths[0]) > self.body_bytes:
            return 413, f"the request has {lengths[0]} bytes, at most {self.body_bytes} are taken."
        return None


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # The rest of the request isn't read, so the connection can't be used again.
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body})
