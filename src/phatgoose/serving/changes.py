"""Experts added, removed and switched while the server runs, and kept in the pool's folder."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from phatgoose.errors import UnknownName
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.packed import PackedExpert
from phatgoose.experts.pool import MANIFEST, Pool, add_to_folder, remove_from_folder
from phatgoose.files import read_json, write_json
from phatgoose.serving.experts import Experts, State
from phatgoose.serving.job import ServingError

STATE = "serving.json"
"""In a pool's folder: which experts are switched off."""


class Changes:
    """One change at a time; each is done as a whole or not at all.

    Args:
        folder: the pool's folder, where changes are kept; None: they last as long as the server.
    """

    def __init__(self, experts: Experts, folder: Path | None = None):
        self.experts, self.folder = experts, folder
        self._changing = asyncio.Lock()

    async def load(self, pool: Pool | None) -> None:
        """The first experts, of which those are off that were when the server ended.

        Raises:
            PhatgooseError: the pool isn't of this base, or the default router can't serve it.
        """
        off: frozenset[str] = frozenset()
        if self.folder is not None and (self.folder / STATE).exists():
            found = read_json(self.folder / STATE, ServingError)
            names = found.get("off") if isinstance(found, dict) else None
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise ServingError(
                    f'{self.folder / STATE} is damaged: expected {{"off": [names]}}. Repair or delete it.'
                )
            off = frozenset(names) & frozenset(pool.names if pool else ())
        if pool is not None:
            await self.experts.activate(await self.experts.prepared(pool, off))

    async def add(self, folder: Path, name: str | None = None) -> str:
        """Adds the expert in this folder; its name.

        Raises:
            PhatgooseError: it can't be read, its name is taken, or it doesn't fit the base or the router. Nothing is changed then.
        """
        async with self._changing:
            expert = await asyncio.to_thread(Expert.load, folder, name=name)
            now = self.experts.state
            pool, off = (now.version.pool if now.version else None), now.off
            if pool is not None and any(isinstance(e, PackedExpert) for e in pool.experts):
                state = await self._added_to_packed(expert, off)
            else:
                state = await self.experts.prepared(pool.add(expert) if pool else Pool([expert]), off)
                if self.folder is not None:
                    await asyncio.to_thread(add_to_folder, self.folder, expert)
            await self.experts.activate(state)
            return expert.name

    async def _added_to_packed(self, expert: Expert, off: frozenset[str]) -> State:
        """A packed pool's rows are used where they stand in its file, so there the file comes first."""
        if self.folder is None:
            raise ServingError("a packed pool without a folder can't be changed.")
        await asyncio.to_thread(add_to_folder, self.folder, expert)
        try:
            return await self.experts.prepared(
                await asyncio.to_thread(Pool.load, self.folder, verify=False), off
            )
        except Exception:
            await asyncio.to_thread(remove_from_folder, self.folder, expert.name)
            raise

    async def remove(self, name: str) -> None:
        """Takes an expert out of the pool, and out of its folder.

        Raises:
            UnknownName: there is none of this name.
        """
        async with self._changing:
            pool = self._pool()
            pool[name]
            left, off = (pool.remove(name) if len(pool) > 1 else None), self.experts.state.off - {name}
            state = await self.experts.prepared(left, off)
            if self.folder is not None:
                await asyncio.to_thread(remove_from_folder, self.folder, name)
            self._keep(off)
            await self.experts.activate(state)

    async def switch(self, name: str, *, on: bool) -> None:
        """Switches an expert on or off for requests that come from now on.

        Raises:
            UnknownName: there is none of this name. RoutingError: the default router can't do without single experts.
        """
        async with self._changing:
            pool = self._pool()
            pool[name]
            off = self.experts.state.off - {name} if on else self.experts.state.off | {name}
            state = replace(self.experts.state, off=off)
            if off != frozenset(pool.names):
                await self.experts.way(state, self.experts.router)
            self._keep(off)
            self.experts.state = state

    async def reload(self) -> None:
        """Reads the pool's folder again.

        Raises:
            PhatgooseError: there is no folder, or it can't be read; the experts stay as they were.
        """
        if self.folder is None:
            raise ServingError(
                "there is no pool's folder to read again: the server was started without --pool."
            )
        async with self._changing:
            there = (self.folder / MANIFEST).exists() and read_manifest(self.folder)["experts"]
            pool = await asyncio.to_thread(Pool.load, self.folder) if there else None
            off = self.experts.state.off & frozenset(pool.names if pool else ())
            state = await self.experts.prepared(pool, off)
            self._keep(off)
            await self.experts.activate(state)

    def listed(self) -> list[dict[str, Any]]:
        """Every expert of the pool, with whether it is on."""
        state = self.experts.state
        return [
            {
                "name": expert.name,
                "on": expert.name not in state.off,
                "gates": expert.gates is not None,
                "modules": len(expert.sizes),
            }
            for expert in (state.version.pool.experts if state.version else ())
        ]

    def _pool(self) -> Pool:
        if self.experts.state.version is None:
            raise UnknownName("there are no experts.")
        return self.experts.state.version.pool

    def _keep(self, off: frozenset[str]) -> None:
        if self.folder is not None:
            write_json(self.folder / STATE, {"off": sorted(off)})
