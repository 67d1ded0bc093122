"""What can be asked for by name."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from phatgoose.errors import RoutingError
from phatgoose.models.batched.version import Route
from phatgoose.registry import unknown
from phatgoose.routers import Single
from phatgoose.routers.example import AUTO
from phatgoose.routers.parse import ROUTERS, is_router, parse_router
from phatgoose.serving.pool.versions import Experts, State

BASE = "base"


@dataclass(frozen=True)
class Found:
    """What a name means."""

    kind: str
    """pool, base, expert or router."""
    route: Route | None


class Catalogue:
    """Names of a server's models.

    Args:
        name: of the routed pool.
    """

    def __init__(self, experts: Experts, name: str = "phatgoose"):
        self.experts, self.name = experts, name
        spec = experts.base.spec
        self.base_name = Path(spec).name if Path(spec).is_dir() else spec
        """The base's own name: of a folder its last part, since where it lies is nobody's business."""

    @property
    def default(self) -> str:
        """What answers a request that names no model, or the base where every expert is off."""
        version = self.experts.state.version
        on = version is not None and set(version.pool.names) - self.experts.state.off
        return self.name if on else BASE

    def models(self) -> list[str]:
        """The names that a client is shown: the pool, the base, every expert that is on. Routers can be asked for, too."""
        version, found = self.experts.state.version, [BASE]
        if version is not None:
            on = [n for n in version.pool.names if n not in self.experts.state.off]
            found = [*([self.name] if on else []), BASE, *map(self._called, on)]
        return found

    def _called(self, expert: str) -> str:
        """An expert's name, or single:NAME where that name means something else."""
        taken = expert in (self.name, BASE, self.base_name) or is_router(expert)
        return f"single:{expert}" if taken else expert

    @contextlib.asynccontextmanager
    async def found(self, name: str | None) -> AsyncIterator[Found]:
        """What a request's `model` means now, which stays as it is inside; None: the pool, or the base where there is none.

        Raises:
            UnknownName: nothing has this name. PhatgooseError: the pool can't be served so.
        """
        state = self.experts.state
        with self.experts.pinned(state.version):
            yield await self._find(state, name)

    async def _find(self, state: State, name: str | None) -> Found:
        if name is None:
            name = self.name if state.version is not None else BASE
        if name in (BASE, self.base_name):
            return Found("base", None)
        if state.version is None:
            raise unknown("model", name, [BASE, self.base_name])
        names = state.version.pool.names
        if name == self.name:
            return Found("pool", await self.experts.route(state, self.experts.router))
        if is_router(name):
            router = parse_router(name)
            if getattr(router, "encoder", AUTO) != AUTO:
                raise RoutingError(
                    "a request can't name an encoder, which is a file of the server's: start it with --router."
                )
            kind = "expert" if isinstance(router, Single) else "router"
            return Found(kind, await self.experts.route(state, name))
        if name in names:
            return Found("expert", Route(state.version, Single(name), state.off))
        raise unknown("model", name, [self.name, BASE, *names, *ROUTERS])
