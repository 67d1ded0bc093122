"""The experts that new requests get, and the routes through them.

Each change makes a new state; a request keeps the one it began with. Replaced experts stay attached until the last
answer that uses them is finished, so no answer mixes two pools.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
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
        router: the router of requests that name none.
        max_routers: how many other routers are kept ready.
        encoder: the sentence encoder that the operator chose for routers that read text, a folder or a Hub id. Besides
            it, only the pinned one and that of `router` are loaded, never one that an expert's author names.
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
        self.state = ExpertState()
        self._routes: OrderedDict[RouteKey, Route] = OrderedDict()
        self._binding: dict[RouteKey, asyncio.Task[Route]] = {}
        # By id: how many requests pin a version, and the versions that were replaced but are still pinned.
        self._pins: Counter[int] = Counter()
        self._retired: dict[int, PoolVersion] = {}
        self._tasks: set[asyncio.Future[Any]] = set()  # the event loop itself keeps no reference to tasks
        own = getattr(parse_router(router), "encoder", AUTO)
        self._encoders = [name for name in (encoder, own) if name not in (None, AUTO)]
        # Requests' routers are bound one at a time. Those that may wait for an encoder don't hold up the others. The
        # default router takes no turn: changes of the experts need it.
        self._turns = {reads_text: asyncio.Semaphore(1) for reads_text in (True, False)}

    @property
    def binding(self) -> int:
        """How many routers are being bound."""
        return len(self._binding)

    @property
    def ready_routers(self) -> int:
        """How many routers are kept ready, the default one included."""
        return len(self._routes)

    @property
    def pins(self) -> int:
        """How many requests keep a version attached."""
        return self._pins.total()

    async def route(self, state: ExpertState, text: str) -> Route:
        """The route of the router `text` through these experts.

        Raises:
            PhatgooseError: there is no such router, or it can't serve these experts.
        """
        version, router = state.version, parse_router(text)
        assert version is not None
        if isinstance(router, Single):
            return Route(version, router, state.off)
        key = (id(version), text, state.off)
        if key in self._routes:
            self._routes.move_to_end(key)
            return self._routes[key]
        if key not in self._binding:
            task = asyncio.ensure_future(self._bind_in_turn(key, state, router))
            self._binding[key] = task
            task.add_done_callback(partial(self._finish_binding, key))
        # Shielded: a client that leaves must not cancel the binding that others wait for.
        return await asyncio.shield(self._binding[key])

    async def _bind_in_turn(self, key: RouteKey, state: ExpertState, router: Router) -> Route:
        version = state.version
        assert version is not None
        turn = self._turns[router.reads == "texts"] if key[1] != self.router else contextlib.nullcontext()
        with self.pin(version):
            async with turn:
                route = await run_in_thread_async(self._bind, version, router, state.off)
            self._routes[key] = route
            self._drop_old_routes(state)
        return route

    def _finish_binding(self, key: RouteKey, task: asyncio.Task[Route]) -> None:
        del self._binding[key]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: perhaps nobody waits for it any more

    def _bind(self, version: PoolVersion, router: Router, off: frozenset[str]) -> Route:
        route = Route(version, router, off, self._allowed_encoder)
        if route.needs_reference:
            self.engine.run_between_passes(route.calibrate)
        return route

    def _allowed_encoder(self, name: str) -> str:
        """The encoder to load where an expert's author or the default router names one.

        Raises:
            RoutingError: it is neither the pinned one nor the operator's.
        """
        if name == DEFAULT_ENCODER or name in self._encoders:
            return name
        if self._encoders:
            # Its sha256 is compared later, which shows whether it is the one that the experts were embedded with.
            return str(self._encoders[0])
        raise RoutingError(
            f"the experts' texts were embedded with another encoder than {DEFAULT_ENCODER}, and a server loads "
            "none that experts name: whoever runs it can choose one with --encoder."
        )

    def _drop_old_routes(self, state: ExpertState) -> None:
        """Drops the routers that weren't used lately. Answers that use them still hold them."""
        default = (id(state.version), self.router, state.off)
        surplus = max(len(self._routes) - self.max_routers - 1, 0)
        for key in [k for k in self._routes if k != default][:surplus]:
            del self._routes[key]

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
        make_version = partial(PoolVersion, self.base, pool, self.options)
        state = ExpertState(await run_in_thread_async(make_version), off)
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
