"""Run a service on a port until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from socket import socket
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from phatgoose.serving.errors import ServingError
from phatgoose.serving.http.app import make_app
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.logs import log, set_up
from phatgoose.serving.service import Service

API_KEYS, ADMIN_KEY = "PHATGOOSE_API_KEY", "PHATGOOSE_ADMIN_KEY"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_KEY_LENGTH = 8
FLUSH_SECONDS = 5
"""How long clients may take to read the last they were sent, when the server breaks answers off."""


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_names(*hosts: str) -> frozenset[str]:
    """These hosts as a request's Host header names them."""
    bare = [host.strip().strip("[]").lower() for host in hosts]
    return frozenset(f"[{host}]" if ":" in host else host for host in bare)


def read_keys(api: Path | None, admin: Path | None) -> Keys:
    """Keys from files, one per line, or from the environment, never from a command line, which others can see.

    Raises:
        ServingError: a file can't be read or holds no key, or a key is too short.
    """
    return Keys.of(_read_keys(api, API_KEYS), _read_keys(admin, ADMIN_KEY))


def _read_keys(file: Path | None, variable: str) -> list[str]:
    if file is None:
        text = os.environ.get(variable, "")
    else:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise ServingError(f"{file}: no keys can be read from it ({cause}).") from None
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if file is not None and not keys:
        raise ServingError(f"{file} holds no key: write one per line.")
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise ServingError(f"{file or variable}: a key is shorter than {MIN_KEY_LENGTH} characters.")
    return keys


def check_host(host: str, keys: Keys) -> None:
    """Refuses, by a ServingError, to listen where other machines can connect, unless there is a key."""
    if not is_local(host) and not keys.api:
        raise ServingError(
            f"{host} can be reached from other machines, and there is no key: give --api-keys FILE or set {API_KEYS}, "
            "or listen on 127.0.0.1."
        )


class Server(uvicorn.Server):
    """uvicorn's server, with a slow end.

    After the first signal it still listens until running answers are finished, so that a load balancer that asks
    /ready gets 503 instead of no connection. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], None]):
        super().__init__(config)
        self.service, self.ready = service, ready
        self._stop_request: tuple[int, float] | None = None
        """The signal, and until when answers may continue."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.config.host, self.servers[0].sockets[0].getsockname()[1]
            log.info("ready", extra={"facts": {"host": host, "port": port}})
            self.ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        if self._stop_request is not None and not self.should_exit:
            signal, end = self._stop_request
            if not self.service.open_requests or time.monotonic() >= end:
                super().handle_exit(signal, None)
        if self.should_exit:
            self.service.break_off()
            self.config.timeout_graceful_shutdown = FLUSH_SECONDS
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stop_request is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        self.service.draining = True
        self._stop_request = sig, time.monotonic() + self.service.settings.drain_seconds
        log.info("ending", extra={"facts": {"answers": len(self.service.engine.jobs)}})


def protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which closes connections whose request has no complete head after so many seconds.

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


def uvicorn_config(
    service: Service,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> uvicorn.Config:
    """uvicorn's configuration for this service."""
    return uvicorn.Config(
        make_app(service, keys, hosts),
        host=host,
        port=port,
        http=protocol(service.settings.body_seconds),
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(service.settings.drain_seconds),
    )


def serve(
    service: Service,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Keys | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves until SIGTERM or SIGINT. Then new requests are refused, and running ones have `drain_seconds`.

    Args:
        port: 0 takes a free one.
        ready: called with the address once requests are accepted.

    Raises:
        ServingError: the host needs a key, or can't be listened on.
    """
    keys = keys or Keys()
    check_host(host, keys)
    hosts = host_names(*LOCAL_NAMES, host) if is_local(host) and not keys.api else None
    set_up()
    server = Server(uvicorn_config(service, keys, hosts, host, port), service, ready)
    facts = {"host": host, "port": port, "engine": type(service.engine).__name__}
    log.info("starting", extra={"facts": facts})
    # uvicorn raises KeyboardInterrupt after an orderly end, and SystemExit if it couldn't start (see below).
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run()
    if service.start_error is not None:
        raise service.start_error
    if not server.started:
        raise ServingError(f"the server couldn't start on {host}:{port}; what is written above says why.")
