"""The embedded server several times, behind Ray Serve: `serve run phatgoose.serving.replicas:app base=BASE pool=POOL replicas=2`.

Each replica is a server of its own, with its own copy of the base and the pool, in a process that Ray starts again when it dies or
its engine does. Needs the extra `phatgoose[replicas]`. Keys are read from the environment of the machines that replicas run on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from phatgoose.serving.apart import apart
from phatgoose.serving.app import make_app
from phatgoose.serving.guard import Keys
from phatgoose.serving.logs import set_up
from phatgoose.serving.run import LOCAL_NAMES, names_of, read_keys
from phatgoose.serving.service import Service
from phatgoose.serving.settings import ServeSettings


class ReplicaSettings(BaseModel):
    """What `serve run` is given as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    base: str
    """An alias, a folder or a Hub id."""
    pool: str | None = None
    """A pool's folder, which every replica's machine must have."""
    router: str = "phatgoose"
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
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of each replica's server: fields of ServeSettings. They follow each other's changes of the folder within `follow_seconds`, 2."""

    def names(self, keys: Keys) -> frozenset[str] | None:
        """What a request's Host header may say; None: anything."""
        return None if keys.api or self.hosts.strip() == "*" else names_of(*self.hosts.split(","))

    def limits(self) -> ServeSettings:
        return ServeSettings(**{"follow_seconds": 2.0, **self.settings})


def make_service(args: ReplicaSettings) -> Service:
    """One replica's server."""
    from phatgoose.models.load import load_base

    base = apart(lambda: load_base(args.base, dtype=args.dtype, device=args.device))
    folder = None if args.pool is None else Path(args.pool)
    return Service(base, args.limits(), folder=folder, router=args.router, name=args.name)


def app(args: ReplicaSettings) -> serve.Application:
    """The application that `serve run` and `serve.run` start."""
    limits = args.limits()

    def build() -> Any:
        set_up()
        keys = read_keys(None, None)
        return make_app(make_service(args), keys, args.names(keys))

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
