"""Run several servers behind Ray Serve.

`serve run phatgoose.serving.replicas:app base=BASE pool=POOL replicas=2`

Each replica is a server of its own, with its own copy of the base and the pool. Ray restarts its process when it or its
engine dies. Needs the extra `phatgoose[replicas]`. Keys are read from the environment of the replicas' machines.
"""

from __future__ import annotations

import errno
import json
from typing import Annotated, Any

from prometheus_client import CollectorRegistry, start_http_server
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve

from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.pool import Pool
from phatgoose.routers.fitting import WITHOUT_POOL
from phatgoose.serving.errors import ServingError
from phatgoose.serving.http.app import make_app
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.http.server import LOCAL_NAMES, host_names, read_keys
from phatgoose.serving.logs import log, set_up
from phatgoose.serving.service import Service
from phatgoose.serving.settings import ServeSettings
from phatgoose.serving.threads import run_in_thread
from phatgoose.shipped import own_folder


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class ReplicaSettings(BaseModel):
    """The arguments of `serve run`, given as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    base: str
    """An alias, a folder or a Hub id."""
    pool: str | None = None
    """A pool's folder, which must be there on every replica's machine, or the name of a pool that comes with
    phatgoose."""
    router: str | None = None
    """The router of requests that name none. None: the one that fits (`fit_router`)."""
    name: str = "phatgoose"
    dtype: str = "auto"
    device: str = "cpu"
    replicas: int = Field(2, ge=1)
    cpus: float = Field(1.0, gt=0)
    """Cores that Ray reserves for a replica."""
    gpus: float = Field(0.0, ge=0)
    hosts: str = ",".join(LOCAL_NAMES)
    """Without a key, the names by which clients may call Ray's proxy, separated by commas. *: any, which also lets in
    pages in browsers that reach it under names of their own."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Each replica serves its metrics on a port of its machine: the first free one of the 2 × replicas ports that begin
    here. None: only /metrics behind Ray's proxy, where each request is answered by some replica."""
    metrics_host: str = "127.0.0.1"
    """Where those ports listen. They need no key; metrics hold nothing of prompts or answers."""
    settings: Annotated[dict[str, Any], BeforeValidator(_from_json)] = Field(default_factory=dict)
    """Each replica's ServeSettings; on the command line as JSON. `follow_seconds` is 2 unless it is given, so that
    replicas take over each other's changes of the folder."""

    def allowed_hosts(self, keys: Keys) -> frozenset[str] | None:
        """What a request's Host header may say; None: anything."""
        return None if keys.api or self.hosts.strip() == "*" else host_names(*self.hosts.split(","))

    def serve_settings(self) -> ServeSettings:
        return ServeSettings(**{"follow_seconds": 2.0, **self.settings})


def make_service(args: ReplicaSettings) -> Service:
    """One replica's server."""
    from phatgoose.models.attach.fitting import fit_router
    from phatgoose.models.base.load import load_base

    folder = own_folder(args.pool)

    def make() -> Service:
        base = load_base(args.base, dtype=args.dtype, device=args.device)
        empty = args.pool is None or (folder is not None and not read_manifest(folder)["experts"])
        pool = None if empty else Pool.load(str(args.pool))
        router = args.router
        if router is None:
            router = WITHOUT_POOL if pool is None else fit_router(base, pool, shared=True).text
        return Service(base, args.serve_settings(), pool=pool, folder=folder, router=router, name=args.name)

    return run_in_thread(make)


def serve_metrics(args: ReplicaSettings, registry: CollectorRegistry) -> int | None:
    """Serves this replica's metrics on the first free one of its ports, which it returns; None without `metrics_port`.
    Raises ServingError: none is free."""
    if args.metrics_port is None:
        return None
    # There may be twice as many replicas while Ray replaces them.
    for port in range(args.metrics_port, args.metrics_port + 2 * args.replicas):
        try:
            start_http_server(port, args.metrics_host, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                why = f"no metrics can be served on {args.metrics_host}:{port}: {error}."
                raise ServingError(why) from None
            continue
        log.info("metrics", extra={"facts": {"host": args.metrics_host, "port": port}})
        return port
    raise ServingError(
        f"no port from {args.metrics_port} to {port} is free for a replica's metrics: choose another metrics_port."
    )


def app(args: dict[str, Any] | ReplicaSettings) -> serve.Application:
    """The application that `serve run`, `serve deploy` and `serve.run` start.

    Args:
        args: the fields of ReplicaSettings. From a command line, Ray passes a dict of texts.

    Raises:
        ValidationError: unknown fields, or values that a field can't have.
    """
    args = ReplicaSettings.model_validate(args)
    settings = args.serve_settings()

    def build() -> Any:
        set_up()
        keys = read_keys(None, None)
        service = make_service(args)
        serve_metrics(args, service.metrics.registry)
        return make_app(service, keys, args.allowed_hosts(keys))

    class Replica:
        app: Any

        def check_health(self) -> None:
            """Called by Ray regularly. Ray replaces a replica that raises."""
            service: Service = self.app.state.service
            if service.started and not service.draining and service.engine.failure is not None:
                raise RuntimeError(service.engine.failure)

    deployment = serve.deployment(
        name="phatgoose",
        num_replicas=args.replicas,
        max_ongoing_requests=settings.max_running + settings.max_waiting,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )
    return deployment(serve.ingress(build)(Replica)).bind()
