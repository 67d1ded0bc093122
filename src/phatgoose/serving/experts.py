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

from phatgoose.experts.pool import Pool
from phatgoose.models.base import Base
from phatgoose.models.ways import Version, Way
from phatgoose.routers import Router, Single, parse_router
from phatgoose.serving.apart import away
from phatgoose.serving.engine import Engine


@dataclass(frozen=True)
class State:
    """The experts as they are now."""

    version: Version | None = None
    """None: there are no experts."""
    off: frozenset[str] = frozenset()


class Experts:
    """Lives on the event loop; what takes long runs in threads.

    Args:
        router: who chooses, where a request doesn't say.
        max_routers: how many others are kept ready.
    """

    def __init__(
        self,
        base: Base,
        engine: Engine,
        *,
        router: str = "phatgoose",
        backend_name: str = "auto",
        max_routers: int = 8,
    ):
        self.base, self.engine, self.router = base, engine, router
        self.backend_name, self.max_routers = backend_name, max_routers
        self.state = State()
        self._ways: OrderedDict[tuple[int, str, frozenset[str]], Way] = OrderedDict()
        self._users: dict[int, int] = {}
        self._retired: dict[int, Version] = {}
        self._tasks: set[asyncio.Future[Any]] = set()  # the event loop alone wouldn't keep them
        self._binding = asyncio.Lock()

    async def way(self, state: State, text: str) -> Way:
        """The way of the router `text` names through these experts.

        Raises:
            PhatgooseError: there is no such router, or it can't serve them.
        """
        version, router = state.version, parse_router(text)
        assert version is not None
        if isinstance(router, Single):
            return Way(version, router, state.off)
        key = (id(version), text, state.off)
        if key not in self._ways:
            async with self._binding:
                if key not in self._ways:
                    self._ways[key] = await away(self._bind, version, router, state.off)
        self._ways.move_to_end(key)
        self._trim(state)
        return self._ways[key]

    def _bind(self, version: Version, router: Router, off: frozenset[str]) -> Way:
        way = Way(version, router, off)
        if way.needs_reference:
            self.engine.between(way.calibrate)
        return way

    def _trim(self, state: State) -> None:
        """Lets go of routers that weren't asked for lately; whoever answers by one still has it."""
        default = (id(state.version), self.router, state.off)
        for key in [k for k in self._ways if k != default][: max(len(self._ways) - self.max_routers - 1, 0)]:
            del self._ways[key]

    @contextlib.contextmanager
    def pinned(self, version: Version | None) -> Iterator[None]:
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
        for stale in [k for k in self._ways if k[0] == key]:
            del self._ways[stale]
        take_off = partial(self.engine.between, lambda: self.engine.mixed.detach(version))
        task = asyncio.ensure_future(away(take_off))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def prepared(self, pool: Pool | None, off: frozenset[str]) -> State:
        """These experts, ready but not attached; raises whatever is wrong with them."""
        if pool is None:
            return State()
        made = partial(Version, self.base, pool, backend_name=self.backend_name)
        state = State(await away(made), off)
        if off != frozenset(pool.names):
            await self.way(state, self.router)
        return state

    async def activate(self, state: State) -> None:
        """Makes these the experts that new requests get."""
        old, version = self.state.version, state.version
        if version is not None:
            await away(self.engine.between, lambda: self.engine.mixed.attach(version))
        self.state = state
        if old is not None:
            key = id(old)
            self._retired[key] = old
            if key not in self._users:
                self._let_go(key)
