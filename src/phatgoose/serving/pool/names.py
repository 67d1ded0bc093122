"""Resolve the model names of requests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from phatgoose.errors import RoutingError, UnknownName
from phatgoose.models.batched.version import Route
from phatgoose.registry import unknown
from phatgoose.routers import Single
from phatgoose.routers.example import AUTO
from phatgoose.routers.parse import ROUTERS, is_router, parse_router
from phatgoose.serving.pool.versions import ExpertState, ServedExperts

BASE = "base"


@dataclass(frozen=True)
class ResolvedModel:
    """What a model name stands for."""

    kind: str
    """pool, base, expert or router."""
    route: Route | None
    """None: the base alone."""


class ModelNames:
    """The names of a server's models.

    Args:
        name: the name of the routed pool.
    """

    def __init__(self, experts: ServedExperts, name: str = "phatgoose"):
        self.experts, self.name = experts, name
        spec = experts.base.spec
        self.base_name = Path(spec).name if Path(spec).is_dir() else spec
        """The base's own name. For a folder only its last part: clients needn't know where it is."""

    @property
    def default(self) -> str:
        """The model of a request that names none: the pool, or the base if no expert is on."""
        return self.name if self.experts.state.names_on else BASE

    def listed(self) -> list[str]:
        """The names that clients are shown: the pool, the base, and every expert that is on.

        Clients can ask for routers, too.
        """
        names_on = self.experts.state.names_on
        return [*([self.name] if names_on else []), BASE, *map(self._expert_name, names_on)]

    def _expert_name(self, expert: str) -> str:
        """An expert's name, or single:NAME if that name stands for something else."""
        taken = expert in (self.name, BASE, self.base_name) or is_router(expert)
        return f"single:{expert}" if taken else expert

    @contextlib.asynccontextmanager
    async def resolve(self, name: str | None) -> AsyncIterator[ResolvedModel]:
        """Resolves a request's `model`; its experts stay attached inside the context.

        Args:
            name: None stands for the pool, or for the base if there is no pool.

        Raises:
            UnknownName: nothing has this name, or the expert is switched off.
            PhatgooseError: the pool can't be served this way.
        """
        state = self.experts.state
        with self.experts.pin(state.version):
            yield await self._resolve(state, name)

    async def _resolve(self, state: ExpertState, name: str | None) -> ResolvedModel:
        if name is None:
            name = self.name if state.version is not None else BASE
        if name in (BASE, self.base_name):
            return ResolvedModel("base", None)
        if state.version is None:
            raise unknown("model", name, [BASE, self.base_name])
        if name == self.name:
            return ResolvedModel("pool", await self.experts.route(state, self.experts.router))
        if is_router(name):
            router = parse_router(name)
        elif name in state.version.pool.names:
            router = Single(name)
        else:
            raise unknown("model", name, [self.name, BASE, *state.version.pool.names, *ROUTERS])
        if isinstance(router, Single):
            names = state.version.pool.names
            if (expert := names[router.place(names)]) in state.off:
                raise UnknownName(f"expert {expert!r} is switched off.")
            return ResolvedModel("expert", Route(state.version, router, state.off))
        if getattr(router, "encoder", AUTO) != AUTO:
            raise RoutingError(
                "a request can't name an encoder, which is a file of the server's: start it with --router."
            )
        return ResolvedModel("router", await self.experts.route(state, name))
