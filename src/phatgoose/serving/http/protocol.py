"""uvicorn's HTTP, with an end to the time that a request's head may take."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(seconds: float) -> type[asyncio.Protocol]:
    """A connection that has begun and not sent a whole head for so long is closed. Its bytes h11 bounds, a body's time the guard, and
    uvicorn the time between an answer and the next request's first byte."""

    class Protocol(H11Protocol):
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            """More of a head doesn't prolong its time."""
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self.late is None:
                self.late = self.loop.call_later(seconds, self._close)

        def _forget(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

        def _close(self) -> None:
            self.late = None
            if self.conn.their_state is h11.IDLE:
                self.transport.close()

    return Protocol
