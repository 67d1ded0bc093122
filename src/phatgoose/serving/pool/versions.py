"""The experts that answer now, and the ways through them, which come and go while the server runs.

Every change makes a new state; a request keeps the one it began with. Experts that were replaced stay attached until the last
answer by them is finished, so no answer mixes two pools.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.sentence_encoder import DEFAULT_ENCODER
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.routers import Router, Single
from phatgoose.routers.example import AUTO
from phatgoose.routers.parse import parse_router
from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.threads import away


class Encoders:
    """Which sentence encoders a server loads.

    Args:
        chosen: by the operator; None: none.
        router: the default router, which may name one.
    """

    def __init__(self, chosen: str | None, router: str):
        own = getattr(parse_router(router), "encoder", AUTO)
        self.chosen = [name for name in (chosen, own) if name not in (None, AUTO)]

    def allowed(self, name: str) -> str:
        """The encoder to load where an expert's author or the default router names one.

        Raises:
            RoutingError: it is neither the pinned one nor the operator's.
        """
        if name == DEFAULT_ENCODER or name in self.chosen:
            return name
        if self.chosen:
            return str(self.chosen[0])  # whether it is the same encoder, its sha256 says
        raise RoutingError(
            f"the experts' texts were embedded with another encoder than {DEFAULT_ENCODER}, and a server loads none that experts name: "
            "whoever runs it can choose one with --encoder."
        )


@dataclass(frozen=True)
class State:
    """The experts as they are now."""

    version: PoolVersion | None = None
    """None: there are no experts."""
    off: frozenset[str] = frozenset()


class Experts:
    """Lives on the event loop; what takes long runs in threads.

    Args:
        router: who chooses, where a request doesn't say.
        max_routers: how many others are kept ready.
        encoder: the sentence encoder that the operator chose for routers that read text, a folder or a Hub id. Beside it only the
            pinned one and that of `router` are loaded: what an expert's author names is never fetched or opened.
    """

    def __init__(
        self,
        base: Base,
        engine: Engine,
        *,
        router: str = "phatgoose",
        options: RouteOptions | None = None,
        max_routers: int = 8,
        encoder: str | None = None,
    ):
        self.base, self.engine, self.router = base, engine, router
        self.options, self.max_routers = options, max_routers
        self.state = State()
        self._routes: OrderedDict[tuple[int, str, frozenset[str]], Route] = OrderedDict()
        self._users: dict[int, int] = {}
        self._retired: dict[int, PoolVersion] = {}
        self._tasks: set[asyncio.Future[Any]] = set()  # the event loop alone wouldn't keep them
        self._encoders = Encoders(encoder, router)
        self._being_bound: dict[tuple[int, str, frozenset[str]], asyncio.Task[Route]] = {}
        # Requests' routers are bound one at a time. Those that may wait for an encoder don't hold the others up, and neither do they
        # the default router, which changes of the experts need.
        self._turns = {reads: asyncio.Semaphore(1) for reads in (True, False)}

    @property
    def being_bound(self) -> int:
        """How many routers are being made ready."""
        return len(self._being_bound)

    async def route(self, state: State, text: str) -> Route:
        """The way of the router `text` names through these experts.

        Raises:
            PhatgooseError: there is no such router, or it can't serve them.
        """
        version, router = state.version, parse_router(text)
        assert version is not None
        if isinstance(router, Single):
            return Route(version, router, state.off)
        key = (id(version), text, state.off)
        if key in self._routes:
            self._routes.move_to_end(key)
            return self._routes[key]
        if key not in self._being_bound:
            task = asyncio.ensure_future(self._made(key, state, router))
            self._being_bound[key] = task
            task.add_done_callback(partial(self._bound, key))
        # Whoever waits may leave; the others who wait for the same router, and those to come, don't.
        return await asyncio.shield(self._being_bound[key])

    async def _made(self, key: tuple[int, str, frozenset[str]], state: State, router: Router) -> Route:
        version = state.version
        assert version is not None
        turn = self._turns[router.reads == "texts"] if key[1] != self.router else contextlib.nullcontext()
        with self.pinned(version):
            async with turn:
                route = await away(self._bind, version, router, state.off)
            self._routes[key] = route
            self._trim(state)
        return route

    def _bound(self, key: tuple[int, str, frozenset[str]], task: asyncio.Task[Route]) -> None:
        del self._being_bound[key]
        if not task.cancelled():
            task.exception()  # whoever waits is told of it; perhaps nobody does any more

    def _bind(self, version: PoolVersion, router: Router, off: frozenset[str]) -> Route:
        route = Route(version, router, off, self._encoders.allowed)
        if route.needs_reference:
            self.engine.between(route.calibrate)
        return route

    def _trim(self, state: State) -> None:
        """Lets go of routers that weren't asked for lately; whoever answers by one still has it."""
        default = (id(state.version), self.router, state.off)
        for key in [k for k in self._routes if k != default][
            : max(len(self._routes) - self.max_routers - 1, 0)
        ]:
            del self._routes[key]

    @contextlib.contextmanager
    def pinned(self, version: PoolVersion | None) -> Iterator[None]:
        """Keeps a version attached."""
        if version is None:
            yield
            return
        key = id(version)
        self._users[key] = self._users.get(key, 0) + 1
        try:
            yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                if key in self._retired:
                    self._let_go(key)

    def _let_go(self, key: int) -> None:
        version = self._retired.pop(key)
        for stale in [k for k in self._routes if k[0] == key]:
            del self._routes[stale]
        take_off = partial(self.engine.between, lambda: self.engine.multi_router.detach(version))
        task = asyncio.ensure_future(away(take_off))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def prepared(self, pool: Pool | None, off: frozenset[str]) -> State:
        """These experts, ready but not attached; raises whatever is wrong with them."""
        if pool is None:
            return State()
        made = partial(PoolVersion, self.base, pool, self.options)
        state = State(await away(made), off)
        if off != frozenset(pool.names):
            await self.route(state, self.router)
        return state

    async def activate(self, state: State) -> None:
        """Makes these the experts that new requests get."""
        old, version = self.state.version, state.version
        if version is not None:
            await away(self.engine.between, lambda: self.engine.multi_router.attach(version))
        self.state = state
        if old is not None:
            key = id(old)
            self._retired[key] = old
            if key not in self._users:
                self._let_go(key)
