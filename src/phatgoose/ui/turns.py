"""One answer at a time: a short queue before one worker thread, left by whoever goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from phatgoose.errors import PhatgooseError

Event = dict[str, Any]
"""What a client is told, as JSON: {"event": kind, …}."""
NEWS_SECONDS = 1.0
"""How often a client that waits is told so; it is then noticed as well if it went away."""


class Busy(PhatgooseError):
    """The queue is full."""


class Job:
    """One answer, from its place in the queue to its end. The worker thread calls `tell` and looks at `stopped`."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def tell(self, event: Event | None) -> None:
        """Hands an event to the client; None: it was the last one."""
        self.soon(self._events.put_nowait, event)

    def soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls something in the server's own thread."""
        with contextlib.suppress(RuntimeError):  # the server has ended, and nobody listens any more
            self._loop.call_soon_threadsafe(call, *arguments)

    async def next(self) -> Event | None:
        """The next event, None after the last one. Raises TimeoutError if nothing happens for NEWS_SECONDS."""
        return await asyncio.wait_for(self._events.get(), NEWS_SECONDS)


class Turns:
    """Runs jobs one after the other. `waiting`: how many may wait behind the one that runs."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._jobs: list[Job] = []  # the first one runs; touched in the server's thread only
        self._worker = ThreadPoolExecutor(1, "phatgoose-ui")

    def submit(self, work: Callable[[Job], None]) -> Job:
        """Queues a job.

        Raises:
            Busy: too many wait already.
        """
        if len(self._jobs) > self.waiting:
            raise Busy(f"{len(self._jobs)} answers are being written or wait; try again in a while.")
        job = Job()
        self._jobs.append(job)
        self._worker.submit(self._run, job, work)
        return job

    def leave(self, job: Job) -> None:
        """Nobody listens to this job any more: it ends at its next token, or gives up its place in the queue at once."""
        job.stopped.set()
        if job in self._jobs[1:]:
            self._jobs.remove(job)

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """A job's events as they come, and how many are before it while it waits."""
        while True:
            try:
                event = await job.next()
            except TimeoutError:
                event = {"event": "waiting", "before": self._jobs.index(job) if job in self._jobs else 0}
            if event is None:
                return
            yield event

    def close(self) -> None:
        """Ends everything; the running job at its next token."""
        for job in self._jobs:
            job.stopped.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job, work: Callable[[Job], None]) -> None:
        try:
            if not job.stopped.is_set():
                work(job)
        except PhatgooseError as error:
            job.tell({"event": "error", "message": str(error)})
        except Exception as error:
            # Whoever runs the server must see it, and the page must not wait for ever.
            logging.getLogger(__name__).exception("an answer failed")
            job.tell({"event": "error", "message": f"{type(error).__name__}; the terminal says more."})
        finally:
            job.soon(self._done, job)

    def _done(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        job.tell(None)
