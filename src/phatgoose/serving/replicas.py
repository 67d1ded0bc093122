"""The embedded server several times, behind Ray Serve: `serve run phatgoose.serving.replicas:app base=BASE pool=POOL replicas=2`.

Each replica is a server of its own, with its own copy of the base and the pool, in a process that Ray starts again when it dies or
its engine does. Needs the extra `phatgoose[replicas]`. Keys are read from the environment of the machines that replicas run on.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve

from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.pool import Pool
from phatgoose.routers.fitting import fitting_router
from phatgoose.serving.engine.job import ServingError
from phatgoose.serving.http.app import make_app
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.http.server import LOCAL_NAMES, names_of, read_keys
from phatgoose.serving.logs import log, set_up
from phatgoose.serving.service import Service
from phatgoose.serving.settings import ServeSettings
from phatgoose.serving.threads import apart


class ReplicaSettings(BaseModel):
    """What `serve run` is given as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    base: str
    """An alias, a folder or a Hub id."""
    pool: str | None = None
    """A pool's folder, which every replica's machine must have."""
    router: str | None = None
    """Who chooses where a request doesn't say. None: phatgoose, or where experts lack gates a router that needs none."""
    name: str = "phatgoose"
    dtype: str = "auto"
    device: str = "cpu"
    replicas: int = Field(2, ge=1)
    cpus: float = Field(1.0, gt=0)
    """Cores that Ray reserves for a replica."""
    gpus: float = Field(0.0, ge=0)
    hosts: str = ",".join(LOCAL_NAMES)
    """Names under which replicas answer where there is no key, with commas between: as clients call Ray's proxy. *: any, which lets pages
    in browsers that can reach it in under names of their own."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Each replica serves its own metrics on a port of its own: the first free one of the 2 × replicas from here on, on its machine.
    None: only /metrics behind Ray's proxy, which is one replica's, another time another's."""
    metrics_host: str = "127.0.0.1"
    """Where those ports listen. They ask for no key; there is nothing of prompts or answers in them."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of each replica's server: fields of ServeSettings; on the command line as JSON. They follow each other's changes of the folder within `follow_seconds`, 2."""

    @field_validator("settings", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    def names(self, keys: Keys) -> frozenset[str] | None:
        """What a request's Host header may say; None: anything."""
        return None if keys.api or self.hosts.strip() == "*" else names_of(*self.hosts.split(","))

    def limits(self) -> ServeSettings:
        return ServeSettings(**{"follow_seconds": 2.0, **self.settings})


def make_service(args: ReplicaSettings) -> Service:
    """One replica's server."""
    from phatgoose.models.base.load import load_base

    folder = None if args.pool is None else Path(args.pool)

    def made() -> Service:
        base = load_base(args.base, dtype=args.dtype, device=args.device)
        pool = Pool.load(folder) if folder is not None and read_manifest(folder)["experts"] else None
        router = args.router or ("phatgoose" if pool is None else fitting_router(pool.experts)[0])
        return Service(base, args.limits(), pool=pool, folder=folder, router=router, name=args.name)

    return apart(made)


def serve_metrics(args: ReplicaSettings, registry: CollectorRegistry) -> int | None:
    """Serves this replica's metrics at the first of its ports that is free; the port, None without one.

    Raises:
        ServingError: none is free.
    """
    if args.metrics_port is None:
        return None
    # While replicas are replaced there may be twice as many.
    for port in range(args.metrics_port, args.metrics_port + 2 * args.replicas):
        try:
            start_http_server(port, args.metrics_host, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ServingError(
                    f"no metrics can be served on {args.metrics_host}:{port}: {error}."
                ) from None
            continue
        log.info("metrics", extra={"facts": {"host": args.metrics_host, "port": port}})
        return port
    raise ServingError(
        f"no port from {args.metrics_port} to {port} is free for a replica's metrics: choose another metrics_port."
    )


def app(args: dict[str, Any] | ReplicaSettings) -> serve.Application:
    """The application that `serve run`, `serve deploy` and `serve.run` start.

    Args:
        args: the fields of ReplicaSettings. Ray gives a dict, whose values on a command line are text.

    Raises:
        ValidationError: they aren't fields of ReplicaSettings, or have other values than those may have.
    """
    args = ReplicaSettings.model_validate(args)
    limits = args.limits()

    def build() -> Any:
        set_up()
        keys = read_keys(None, None)
        service = make_service(args)
        serve_metrics(args, service.metrics.registry)
        return make_app(service, keys, args.names(keys))

    class Replica:
        app: Any

        def check_health(self) -> None:
            """Asked by Ray now and then; a replica that raises is replaced."""
            service: Service = self.app.state.service
            if service.started and not service.draining and service.engine.trouble is not None:
                raise RuntimeError(service.engine.trouble)

    deployment = serve.deployment(
        name="phatgoose",
        num_replicas=args.replicas,
        max_ongoing_requests=limits.max_running + limits.max_waiting,
        graceful_shutdown_timeout_s=limits.drain_seconds,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )
    return deployment(serve.ingress(build)(Replica)).bind()
