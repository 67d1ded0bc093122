"""uvicorn's HTTP protocol, with a time limit for a request's head."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(seconds: float) -> type[asyncio.Protocol]:
    """A protocol that closes connections whose request has no complete head after so many seconds.

    The rest is limited elsewhere: a head's bytes by h11, a body's time by the guard, and the time between an answer and
    the next request's first byte by uvicorn.
    """

    class Protocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's own type
            super().connection_made(transport)
            self._update_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._cancel_timer()

        def _update_timer(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._cancel_timer()
            elif self.timer is None:  # more bytes of a head don't prolong its time
                self.timer = self.loop.call_later(seconds, self._close)

        def _cancel_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _close(self) -> None:
            self.timer = None
            if self.conn.their_state is h11.IDLE:
                self.transport.close()

    return Protocol
