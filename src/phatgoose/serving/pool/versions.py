"""The experts that new requests get, the names of models, and the routes that these stand for.

Each change makes a new state; a request keeps the one it began with. Replaced experts stay attached until the last
answer that uses them is finished, so no answer mixes two pools.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phatgoose.errors import RoutingError, UnknownName
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.sentence_encoder import DEFAULT_ENCODER
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.registry import unknown
from phatgoose.routers import Router, Single
from phatgoose.routers.example import AUTO
from phatgoose.routers.parse import BASE, ROUTERS, is_router, parse_router
from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.threads import run_in_thread_async

RouteKey = tuple[int, str, frozenset[str]]
"""A version's id, a router's text, and the experts that are switched off."""


@dataclass(frozen=True)
class ExpertState:
    """The experts at one time."""

    version: PoolVersion | None = None
    """None: there are no experts."""
    off: frozenset[str] = frozenset()

    @property
    def names_on(self) -> list[str]:
        """The experts that aren't switched off."""
        names = () if self.version is None else self.version.pool.names
        return [name for name in names if name not in self.off]


class ServedExperts:
    """The experts and their routes. It lives on the event loop; slow work runs in threads.

    Args:
        router: the router of requests that name none. Of sentence encoders, for routers that read text, only its own,
            that of the settings and the pinned one are loaded, never one that an expert's author names.
    """

    def __init__(self, engine: Engine, router: str = "phatgoose", options: RouteOptions | None = None):
        self.base, self.engine, self.router, self.options = engine.base, engine, router, options
        self.state = ExpertState()
        self._routes: OrderedDict[RouteKey, asyncio.Task[Route]] = OrderedDict()
        """Routes that are bound or being bound, the one used last at the end."""
        # By id: how many requests pin a version, and the versions that were replaced but are still pinned.
        self._pins: Counter[int] = Counter()
        self._retired: dict[int, PoolVersion] = {}
        self._tasks: set[asyncio.Future[Any]] = set()  # the event loop itself keeps no reference to tasks
        own = getattr(parse_router(router), "encoder", AUTO)
        self._encoders = [name for name in (engine.settings.encoder, own) if name not in (None, AUTO)]
        # Requests' routers are bound one at a time. Those that may wait for an encoder don't hold up the others. The
        # default router takes no turn: changes of the experts need it.
        self._turns = {reads_text: asyncio.Semaphore(1) for reads_text in (True, False)}

    @property
    def binding(self) -> int:
        """How many routers are being bound."""
        return len(self._routes) - self.ready_routers

    @property
    def ready_routers(self) -> int:
        """How many routers are kept ready, the default one included."""
        return sum(task.done() for task in list(self._routes.values()))

    @property
    def pins(self) -> int:
        """How many requests keep a version attached."""
        return self._pins.total()

    async def route(self, state: ExpertState, text: str) -> Route:
        """The route of the router `text` through these experts; PhatgooseError if it can't serve them."""
        version, router = state.version, parse_router(text)
        assert version is not None
        if isinstance(router, Single):
            return Route(version, router, state.off)
        key = (id(version), text, state.off)
        if key not in self._routes:
            self._routes[key] = asyncio.ensure_future(self._bind_in_turn(key, state, router))
            self._routes[key].add_done_callback(partial(self._drop_failed, key))
        self._routes.move_to_end(key)
        # Shielded: a client that leaves must not cancel the binding that others wait for.
        return await asyncio.shield(self._routes[key])

    async def _bind_in_turn(self, key: RouteKey, state: ExpertState, router: Router) -> Route:
        version = state.version
        assert version is not None
        default = (id(version), self.router, state.off)
        turn = contextlib.nullcontext() if key == default else self._turns[router.reads == "texts"]
        with self.pin(version):
            async with turn:
                route = await run_in_thread_async(self._bind, version, router, state.off)
            self._routes.move_to_end(key)  # others may have been used while it was bound
        # The routers that weren't used lately are dropped. Answers that use them still hold them.
        ready = [k for k, task in self._routes.items() if k == key or task.done()]
        surplus = max(len(ready) - self.engine.settings.max_routers - 1, 0)
        for old in [k for k in ready if k != default][:surplus]:
            del self._routes[old]
        return route

    def _drop_failed(self, key: RouteKey, task: asyncio.Task[Route]) -> None:
        # Asking for the exception also marks it as retrieved: perhaps nobody waits for it any more.
        if (task.cancelled() or task.exception() is not None) and self._routes.get(key) is task:
            del self._routes[key]

    def _bind(self, version: PoolVersion, router: Router, off: frozenset[str]) -> Route:
        route = Route(version, router, off, self._allowed_encoder)
        if route.needs_reference:
            self.engine.run_between_passes(route.calibrate)
        return route

    def _allowed_encoder(self, name: str) -> str:
        """The encoder to load where an expert's author or the default router names one; RoutingError if none may be."""
        if name == DEFAULT_ENCODER or name in self._encoders:
            return name
        if self._encoders:
            # Its sha256 is compared later, which shows whether it is the one that the experts were embedded with.
            return str(self._encoders[0])
        raise RoutingError(
            f"the experts' texts were embedded with another encoder than {DEFAULT_ENCODER}, and a server loads "
            "none that experts name: whoever runs it can choose one with --encoder."
        )

    @contextlib.contextmanager
    def pin(self, version: PoolVersion | None) -> Iterator[None]:
        """Keeps a version attached."""
        if version is None:
            yield
            return
        key = id(version)
        self._pins[key] += 1
        try:
            yield
        finally:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                if key in self._retired:
                    self._detach(key)

    def _detach(self, key: int) -> None:
        version = self._retired.pop(key)
        for stale in [k for k in self._routes if k[0] == key]:
            del self._routes[stale]
        detach = partial(self.engine.run_between_passes, partial(self.engine.multi_router.detach, version))
        task = asyncio.ensure_future(run_in_thread_async(detach))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def prepare(self, pool: Pool | None, off: frozenset[str]) -> ExpertState:
        """The state with these experts, ready but not attached. Raises whatever is wrong with them."""
        if pool is None:
            return ExpertState()
        version = await run_in_thread_async(PoolVersion, self.base, pool, self.options)
        return await self.bound(ExpertState(version, off))

    async def bound(self, state: ExpertState) -> ExpertState:
        """The same state, once its default route is bound."""
        if state.names_on:
            await self.route(state, self.router)
        return state

    async def activate(self, state: ExpertState) -> None:
        """Gives new requests these experts."""
        old, version = self.state.version, state.version
        if version is not None:
            attach = partial(self.engine.multi_router.attach, version)
            await run_in_thread_async(self.engine.run_between_passes, attach)
        self.state = state
        if old is not None:
            self._retired[id(old)] = old
            if id(old) not in self._pins:
                self._detach(id(old))


@dataclass(frozen=True)
class ResolvedModel:
    """What a model name stands for."""

    kind: str
    """pool, base, expert or router."""
    route: Route | None
    """None: the base alone."""


class ModelNames:
    """The names of a server's models, of which `name` is the routed pool's."""

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
        """The names that clients are shown: the pool, the base, and the experts that are on, but no routers."""
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
        version = state.version
        if name is None:
            name = self.name if version is not None else BASE
        if name in (BASE, self.base_name):
            return ResolvedModel("base", None)
        if version is None:
            raise unknown("model", name, [BASE, self.base_name])
        names = version.pool.names
        if name == self.name:
            return ResolvedModel("pool", await self.experts.route(state, self.experts.router))
        if is_router(name):
            router = parse_router(name)
        elif name in names:
            router = Single(name)
        else:
            raise unknown("model", name, [self.name, BASE, *names, *ROUTERS])
        if isinstance(router, Single):
            if (expert := names[router.place(names)]) in state.off:
                raise UnknownName(f"expert {expert!r} is switched off.")
            return ResolvedModel("expert", Route(version, router, state.off))
        if getattr(router, "encoder", AUTO) != AUTO:
            raise RoutingError(
                "a request can't name an encoder, which is a file of the server's: start it with --router."
            )
        return ResolvedModel("router", await self.experts.route(state, name))
