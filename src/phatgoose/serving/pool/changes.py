"""Add, remove and switch experts while the server runs, and keep that in the pool's folder.

Several servers may share the folder.
"""

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
from phatgoose.serving.errors import ServingError
from phatgoose.serving.logs import log
from phatgoose.serving.pool.versions import ExpertState, ServedExperts
from phatgoose.serving.threads import run_in_thread_async

STATE = "serving.json"
"""In a pool's folder: which experts are switched off."""
LOCK, LOCK_SECONDS = ".serving.lock", 60.0
"""Held by the server that changes a folder."""
UNREAD = (None, None)
"""The stamp of a folder that must be read again, whatever it holds."""


class PoolChanges:
    """Makes one change at a time; each is done completely or not at all.

    Args:
        folder: the pool's folder, where changes are kept; None: they last as long as the server.
    """

    def __init__(self, experts: ServedExperts, folder: Path | None = None):
        self.experts, self.folder = experts, folder
        self._changing = asyncio.Lock()
        self._read_stamp = self._stamp()
        """The folder's stamp when it was last read."""

    async def load(self, pool: Pool | None) -> None:
        """Loads the first experts: `pool`, or those of the folder. Experts stay off that were off when a server ended.

        Raises:
            PhatgooseError: the pool can't be read, is of another base, or the default router can't serve it.
        """
        if pool is not None:
            await self.experts.activate(await self.experts.prepare(pool, self._read_off(pool)))
            # The folder may have been changed since the pool was read.
            if self.folder is not None and not self._folder_matches({}):
                self._read_stamp = UNREAD
        elif self.folder is not None:
            await self._read_folder()

    async def follow(self, seconds: float) -> None:
        """Takes over what others change in the folder, which is checked every so many seconds."""
        tried = self._read_stamp
        while True:
            await asyncio.sleep(seconds)
            if (now := self._stamp()) in (self._read_stamp, tried):
                continue
            tried = now
            try:
                async with self._changing:
                    if self._stamp() != self._read_stamp:
                        await self._read_folder()
            except Exception:  # whatever is wrong with the folder, the next change may repair it
                log.exception("the pool's folder was changed and can't be read; the experts stay")

    async def add(self, folder: Path, name: str | None = None) -> str:
        """Adds the expert in this folder; returns its name.

        Raises:
            PhatgooseError: it can't be read, its name is taken, or it doesn't fit the base or the router. Nothing is
                changed then.
        """
        async with self._change():
            expert = await run_in_thread_async(Expert.load, folder, name=name)
            version, off = self.experts.state.version, self.experts.state.off
            pool = version.pool if version else None
            if pool and any(isinstance(e, PackedExpert) for e in pool.experts):
                state = await self._add_to_packed(expert, off)
            else:
                state = await self.experts.prepare(pool.add(expert) if pool else Pool([expert]), off)
                if self.folder is not None:
                    await run_in_thread_async(add_to_folder, self.folder, expert)
            await self.experts.activate(state)
            return expert.name

    async def _add_to_packed(self, expert: Expert, off: frozenset[str]) -> ExpertState:
        """Changes the folder first: a packed pool's rows are used where they are in its file."""
        if self.folder is None:
            raise ServingError("a packed pool without a folder can't be changed.")
        await run_in_thread_async(add_to_folder, self.folder, expert)
        try:
            pool = await run_in_thread_async(Pool.load, self.folder, verify=False)
            return await self.experts.prepare(pool, off)
        except Exception:
            await run_in_thread_async(remove_from_folder, self.folder, expert.name)
            raise

    async def remove(self, name: str) -> None:
        """Takes an expert out of the pool and its folder. Raises UnknownName: there is no such expert."""
        async with self._change():
            pool = self._pool()
            pool[name]
            left, off = (pool.remove(name) if len(pool) > 1 else None), self.experts.state.off - {name}
            state = await self.experts.prepare(left, off)
            if self.folder is not None:
                await run_in_thread_async(remove_from_folder, self.folder, name)
            self._write_off(off)
            await self.experts.activate(state)

    async def switch(self, name: str, *, on: bool) -> None:
        """Switches an expert on or off for new requests.

        Raises:
            UnknownName: there is no such expert. RoutingError: the default router can't leave out single experts.
        """
        async with self._change():
            self._pool()[name]
            off = self.experts.state.off - {name} if on else self.experts.state.off | {name}
            state = await self.experts.bound(replace(self.experts.state, off=off))
            self._write_off(off)
            self.experts.state = state

    async def reload(self) -> None:
        """Reads the pool's folder again. If it can't be read (PhatgooseError), the experts stay as they were."""
        if self.folder is None:
            raise ServingError(
                "there is no pool's folder to read again: the server was started without one of the user's (--pool)."
            )
        async with self._changing:
            await self._read_folder(whole=True)

    def list_experts(self) -> list[dict[str, Any]]:
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
        """Allows one change at a time, also among servers that share the folder. It begins with what is there."""
        async with self._changing:
            if self.folder is None:
                yield
                return
            if not (self.folder / MANIFEST).is_file():  # the lock file would create the folder again
                raise ServingError(
                    f"{self.folder} isn't a pool's folder any more, so nothing is changed: put {MANIFEST} back."
                )
            lock = FileLock(self.folder / LOCK, timeout=LOCK_SECONDS, thread_local=False)
            try:
                with storage_errors(self.folder / LOCK):
                    await asyncio.to_thread(lock.acquire)
            except Timeout:
                raise ServingError(f"{self.folder} is being changed by another server: try again.") from None
            try:
                if self._stamp() != self._read_stamp:
                    await self._read_folder()
                before = {entry["name"]: entry for entry in self._manifest_entries()}
                yield
                stamp = self._stamp()
                # Only servers wait for the lock. What `phatgoose pool add` did meanwhile is still to be read.
                self._read_stamp = stamp if self._folder_matches(before) else UNREAD
            finally:
                lock.release()

    async def _read_folder(self, *, whole: bool = False) -> None:
        """Makes the experts those of the folder. Reads only what changed, unless `whole` is set."""
        assert self.folder is not None
        stamp, version = self._stamp(), self.experts.state.version
        if version is not None and stamp[0] == self._read_stamp[0] and not whole:
            off = self._read_off(version.pool)
            self.experts.state = await self.experts.bound(replace(self.experts.state, off=off))
        else:
            entries = read_manifest(self.folder)["experts"]
            pool = await run_in_thread_async(Pool.load, self.folder) if entries else None
            await self.experts.activate(await self.experts.prepare(pool, self._read_off(pool)))
        self._read_stamp = stamp

    def _read_off(self, pool: Pool | None) -> frozenset[str]:
        """Which of a pool's experts the folder says are off."""
        if self.folder is None or not (self.folder / STATE).exists():
            return frozenset()
        data = read_json(self.folder / STATE, ServingError)
        names = data.get("off") if isinstance(data, dict) else None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ServingError(
                f'{self.folder / STATE} is damaged: expected {{"off": [names]}}. Repair or delete it.'
            )
        return frozenset(names) & frozenset(pool.names if pool else ())

    def _write_off(self, off: frozenset[str]) -> None:
        if self.folder is not None:
            write_json(self.folder / STATE, {"off": sorted(off)})

    def _folder_matches(self, known: Mapping[str, Any]) -> bool:
        """Whether the folder holds the experts that are in memory; entries in `known` must be unchanged."""
        version = self.experts.state.version
        try:
            entries = self._manifest_entries()
        except PhatgooseError:  # it is damaged, which the next one to read it reports
            return False
        unchanged = all(known.get(entry["name"], entry) == entry for entry in entries)
        names = version.pool.names if version else ()
        return unchanged and tuple(entry["name"] for entry in entries) == names

    def _manifest_entries(self) -> list[Any]:
        """The folder's list of experts; empty without a manifest."""
        if self.folder is None or not (self.folder / MANIFEST).exists():
            return []
        return list(read_manifest(self.folder)["experts"])

    def _stamp(self) -> tuple[tuple[int, ...] | None, ...]:
        """Changes whenever the folder's manifest or its list of switched-off experts is written."""
        return tuple(map(_file_stamp, (self.folder / MANIFEST, self.folder / STATE))) if self.folder else ()

    def _pool(self) -> Pool:
        if self.experts.state.version is None:
            raise UnknownName("there are no experts.")
        return self.experts.state.version.pool


def _file_stamp(file: Path) -> tuple[int, ...] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
