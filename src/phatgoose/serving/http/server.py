"""A service on a port, until it is told to end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from socket import socket
from types import FrameType

import uvicorn

from phatgoose.serving.engine.job import ServingError
from phatgoose.serving.http.app import make_app
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.http.protocol import protocol
from phatgoose.serving.logs import log, set_up
from phatgoose.serving.service import Service

API_KEYS, ADMIN_KEY = "PHATGOOSE_API_KEY", "PHATGOOSE_ADMIN_KEY"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
SHORTEST = 8
"""Characters of a key."""


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def names_of(*hosts: str) -> frozenset[str]:
    """These hosts as a request's Host header names them."""
    bare = [host.strip().strip("[]").lower() for host in hosts]
    return frozenset(f"[{host}]" if ":" in host else host for host in bare)


def read_keys(api: Path | None, admin: Path | None) -> Keys:
    """Keys from files, one a line, or from the environment: a command line is seen by others.

    Raises:
        ServingError: a file can't be read or holds no key, or a key is too short.
    """
    return Keys.of(_keys(api, API_KEYS), _keys(admin, ADMIN_KEY))


def _keys(file: Path | None, variable: str) -> list[str]:
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise ServingError(f"{file}: no keys can be read from it ({cause}).") from None
    else:
        text = os.environ.get(variable, "")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if file is not None and not found:
        raise ServingError(f"{file} holds no key: write one a line.")
    where = variable if file is None else str(file)
    if any(len(key) < SHORTEST for key in found):
        raise ServingError(f"{where}: a key is shorter than {SHORTEST} characters.")
    return found


def check_host(host: str, keys: Keys) -> None:
    """Refuses to be reached from elsewhere without a key.

    Raises:
        ServingError: saying how to set one.
    """
    if not is_local(host) and not keys.api:
        raise ServingError(
            f"{host} can be reached from other machines, and there is no key: give --api-keys FILE or set {API_KEYS}, or listen on "
            "127.0.0.1."
        )


FLUSH_SECONDS = 5
"""How long clients may take to read what they were told last."""


class Server(uvicorn.Server):
    """Once it is told to end, it still listens until what was begun is answered, so that a load balancer that asks /ready hears 503
    instead of nothing. Told again, it ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], None]):
        super().__init__(config)
        self.service, self.ready = service, ready
        self._told: tuple[int, float] | None = None
        """The signal, and until when answers may go on."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.config.host, self.servers[0].sockets[0].getsockname()[1]
            log.info("ready", extra={"facts": {"host": host, "port": port}})
            self.ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        if self._told is not None and not self.should_exit:
            signal, end = self._told
            if not self.service.inside or time.monotonic() >= end:
                super().handle_exit(signal, None)
        if self.should_exit:
            self.service.give_up()
            self.config.timeout_graceful_shutdown = FLUSH_SECONDS
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        self.service.draining = True
        self._told = sig, time.monotonic() + self.service.settings.drain_seconds
        log.info("ending", extra={"facts": {"answers": len(self.service.engine.jobs)}})


def uvicorn_config(
    service: Service,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> uvicorn.Config:
    """How uvicorn is to run the service's interface."""
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
    """Serves until SIGTERM or SIGINT: then nobody new comes in, and what was begun has `drain_seconds` to finish.

    Args:
        port: 0 takes a free one.
        ready: told the address once requests are taken.

    Raises:
        ServingError: the place isn't safe, or can't be listened on.
    """
    keys = keys or Keys()
    check_host(host, keys)
    hosts = names_of(*LOCAL_NAMES, host) if is_local(host) and not keys.api else None
    set_up()
    server = Server(uvicorn_config(service, keys, hosts, host, port), service, ready)
    log.info(
        "starting", extra={"facts": {"host": host, "port": port, "engine": type(service.engine).__name__}}
    )
    # Where uvicorn has ended in order it says so by the one, and where it couldn't start by the other; why is said below.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run()
    if service.failure is not None:
        raise service.failure
    if not server.started:
        raise ServingError(f"the server couldn't start on {host}:{port}; what is written above says why.")
