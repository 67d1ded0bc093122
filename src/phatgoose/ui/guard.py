"""Keep other sites and other machines out of a server on this machine.

A page from elsewhere can send requests here, and even read the answers if its own name is given our address
(DNS rebinding). So the Host must be this machine's own name, a question must come from our own page or from no
page at all, as JSON, and responses can't be framed, embedded or cached.
"""

from __future__ import annotations

import re

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI middleware that refuses requests before the application sees them."""

    def __init__(self, app: ASGIApp, body_bytes: int) -> None:
        self.app, self.body_bytes = app, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    sent.setdefault(name, value)
            await send(message)

        if scope["type"] != "http":  # a web socket; there are none here
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := self._refusal(scope["method"], Headers(scope=scope))) is not None:
            status, reason = refusal
            # The rest of the request isn't read, so the connection can't be used again.
            response = JSONResponse({"error": reason}, status, {"connection": "close"})
            await response(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """The status and reason of a refusal, or None."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not _LOOPBACK.fullmatch(hosts[0]):
            return 421, "this server answers to localhost and 127.0.0.1 only."
        if method in ("GET", "HEAD"):
            return None
        here = f"http://{hosts[0]}".lower()
        if any(origin.lower() != here for origin in headers.getlist("origin")) or any(
            site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")
        ):
            return 403, "questions are taken from this server's own page only."
        kinds = [kind.partition(";")[0].strip().lower() for kind in headers.getlist("content-type")]
        if kinds != ["application/json"]:
            return 415, "expected content-type application/json."
        lengths = headers.getlist("content-length")
        # A chunked body has any length, whatever the content-length says.
        if "transfer-encoding" in headers or len(lengths) != 1 or not re.fullmatch(r"\d{1,18}", lengths[0]):
            return 411, "expected one content-length."
        if int(lengths[0]) > self.body_bytes:
            return 413, f"the request has {lengths[0]} bytes, at most {self.body_bytes} are taken."
        return None
