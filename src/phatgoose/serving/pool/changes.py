"""Experts added, removed and switched while the server runs, and kept in the pool's folder, which several servers may share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from phatgoose.errors import PhatgooseError, UnknownName
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.names import MANIFEST
from phatgoose.experts.packed.expert import PackedExpert
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder
from phatgoose.files import read_json, storage_errors, write_json
from phatgoose.serving.engine.job import ServingError
from phatgoose.serving.logs import log
from phatgoose.serving.pool.versions import Experts, State
from phatgoose.serving.threads import away

STATE = "serving.json"
"""In a pool's folder: which experts are switched off."""
LOCK, LOCK_SECONDS = ".serving.lock", 60.0
"""Held by the server that changes a folder."""
UNSEEN = (None, None)
"""The stamp of a folder that is to be read, whatever it holds."""


class Changes:
    """One change at a time; each is done as a whole or not at all.

    Args:
        folder: the pool's folder, where changes are kept; None: they last as long as the server.
    """

    def __init__(self, experts: Experts, folder: Path | None = None):
        self.experts, self.folder = experts, folder
        self._changing = asyncio.Lock()
        self._seen = self._stamp()

    async def load(self, pool: Pool | None) -> None:
        """The first experts, of which those are off that were when the server ended; without a pool those of the folder.

        Raises:
            PhatgooseError: the pool can't be read, isn't of this base, or the default router can't serve it.
        """
        if pool is not None:
            await self.experts.activate(await self.experts.prepared(pool, self._off(pool)))
            if self.folder is not None and not self._is_of_folder({}):  # changed since the pool was read
                self._seen = UNSEEN
        elif self.folder is not None:
            await self._read()

    async def follow(self, seconds: float) -> None:
        """Takes over what others change in the folder, which is looked at every so many seconds."""
        tried = self._seen
        while True:
            await asyncio.sleep(seconds)
            if (now := self._stamp()) in (self._seen, tried):
                continue
            tried = now
            try:
                async with self._changing:
                    if self._stamp() != self._seen:
                        await self._read()
            except Exception:  # whatever is wrong with it, the next change may mend it
                log.exception("the pool's folder was changed and can't be read; the experts stay")

    async def add(self, folder: Path, name: str | None = None) -> str:
        """Adds the expert in this folder; its name.

        Raises:
            PhatgooseError: it can't be read, its name is taken, or it doesn't fit the base or the router. Nothing is changed then.
        """
        async with self._change():
            expert = await away(Expert.load, folder, name=name)
            now = self.experts.state
            pool, off = (now.version.pool if now.version else None), now.off
            if pool is not None and any(isinstance(e, PackedExpert) for e in pool.experts):
                state = await self._added_to_packed(expert, off)
            else:
                state = await self.experts.prepared(pool.add(expert) if pool else Pool([expert]), off)
                if self.folder is not None:
                    await away(add_to_folder, self.folder, expert)
            await self.experts.activate(state)
            return expert.name

    async def _added_to_packed(self, expert: Expert, off: frozenset[str]) -> State:
        """A packed pool's rows are used where they stand in its file, so there the file comes first."""
        if self.folder is None:
            raise ServingError("a packed pool without a folder can't be changed.")
        await away(add_to_folder, self.folder, expert)
        try:
            return await self.experts.prepared(await away(Pool.load, self.folder, verify=False), off)
        except Exception:
            await away(remove_from_folder, self.folder, expert.name)
            raise

    async def remove(self, name: str) -> None:
        """Takes an expert out of the pool, and out of its folder.

        Raises:
            UnknownName: there is none of this name.
        """
        async with self._change():
            pool = self._pool()
            pool[name]
            left, off = (pool.remove(name) if len(pool) > 1 else None), self.experts.state.off - {name}
            state = await self.experts.prepared(left, off)
            if self.folder is not None:
                await away(remove_from_folder, self.folder, name)
            self._keep(off)
            await self.experts.activate(state)

    async def switch(self, name: str, *, on: bool) -> None:
        """Switches an expert on or off for requests that come from now on.

        Raises:
            UnknownName: there is none of this name. RoutingError: the default router can't do without single experts.
        """
        async with self._change():
            pool = self._pool()
            pool[name]
            off = self.experts.state.off - {name} if on else self.experts.state.off | {name}
            state = await self._switched(off)
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
            await self._read(whole=True)

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

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """One change at a time, also among servers that share the folder; each begins with what is there."""
        async with self._changing:
            if self.folder is None:
                yield
                return
            if not (self.folder / MANIFEST).is_file():  # or the lock would make the folder anew
                raise ServingError(
                    f"{self.folder} isn't a pool's folder any more, so nothing is changed: put {MANIFEST} back."
                )
            held = FileLock(self.folder / LOCK, timeout=LOCK_SECONDS, thread_local=False)
            try:
                with storage_errors(self.folder / LOCK):
                    await asyncio.to_thread(held.acquire)
            except Timeout:
                raise ServingError(f"{self.folder} is being changed by another server: try again.") from None
            try:
                if self._stamp() != self._seen:
                    await self._read()
                before = {entry["name"]: entry for entry in self._entries()}
                yield
                stamp = self._stamp()
                # Others than servers don't wait for the lock: what `phatgoose pool add` did meanwhile is still to be read.
                self._seen = stamp if self._is_of_folder(before) else UNSEEN
            finally:
                held.release()

    async def _read(self, *, whole: bool = False) -> None:
        """Makes the experts those of the folder; only what changed, unless the whole is asked for."""
        assert self.folder is not None
        stamp, version = self._stamp(), self.experts.state.version
        if version is not None and stamp[0] == self._seen[0] and not whole:
            self.experts.state = await self._switched(self._off(version.pool))
        else:
            there = read_manifest(self.folder)["experts"]
            pool = await away(Pool.load, self.folder) if there else None
            await self.experts.activate(await self.experts.prepared(pool, self._off(pool)))
        self._seen = stamp

    async def _switched(self, off: frozenset[str]) -> State:
        """The experts as they are but for those that are off, ready to answer."""
        state = replace(self.experts.state, off=off)
        if state.version is not None and off != frozenset(state.version.pool.names):
            await self.experts.route(state, self.experts.router)
        return state

    def _off(self, pool: Pool | None) -> frozenset[str]:
        """Which of a pool's experts are off by the folder."""
        if self.folder is None or not (self.folder / STATE).exists():
            return frozenset()
        found = read_json(self.folder / STATE, ServingError)
        names = found.get("off") if isinstance(found, dict) else None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ServingError(
                f'{self.folder / STATE} is damaged: expected {{"off": [names]}}. Repair or delete it.'
            )
        return frozenset(names) & frozenset(pool.names if pool else ())

    def _is_of_folder(self, known: Mapping[str, Any]) -> bool:
        """Whether the folder holds the experts of memory, those that are `known` as they were."""
        version = self.experts.state.version
        names = version.pool.names if version is not None else ()
        try:
            there = self._entries()
        except PhatgooseError:  # it is being damaged, which whoever reads it next says
            return False
        same = all(known.get(entry["name"], entry) == entry for entry in there)
        return same and tuple(entry["name"] for entry in there) == names

    def _entries(self) -> list[Any]:
        """The folder's list of experts, if there is one."""
        if self.folder is None or not (self.folder / MANIFEST).exists():
            return []
        return list(read_manifest(self.folder)["experts"])

    def _stamp(self) -> tuple[tuple[int, ...] | None, ...]:
        """What tells that the folder's list of experts, or of those that are off, was written."""
        return tuple(map(_written, (self.folder / MANIFEST, self.folder / STATE))) if self.folder else ()

    def _pool(self) -> Pool:
        if self.experts.state.version is None:
            raise UnknownName("there are no experts.")
        return self.experts.state.version.pool

    def _keep(self, off: frozenset[str]) -> None:
        if self.folder is not None:
            write_json(self.folder / STATE, {"off": sorted(off)})


def _written(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
