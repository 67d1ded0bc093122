"""One answer at a time: a short queue for one worker thread, which clients can leave."""

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
"""One message to a client, as JSON: {"event": kind, …}."""
KEEP_ALIVE_SECONDS = 1.0
"""How often a waiting client gets an event. A client that went away is noticed then, too."""


class Busy(PhatgooseError):
    """The queue is full."""


class QueuedAnswer:
    """One answer, from its place in the queue to its end. The worker thread calls `send` and looks at `stopped`."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    def send(self, event: Event | None) -> None:
        """Hands an event to the client. None ends the answer."""
        self.call_soon(self.events.put_nowait, event)

    def call_soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls `call` in the server's thread."""
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(call, *arguments)


class AnswerQueue:
    """Runs answers one after the other. `waiting`: how many may wait behind the one that runs."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._answers: list[QueuedAnswer] = []  # the first one runs; touched in the server's thread only
        self._worker = ThreadPoolExecutor(1, "phatgoose-ui")

    def submit(self, work: Callable[[QueuedAnswer], None]) -> QueuedAnswer:
        """Queues an answer, which `work` will write. Raises Busy: too many are waiting."""
        if len(self._answers) > self.waiting:
            raise Busy(f"{len(self._answers)} answers are being written or wait; try again in a while.")
        queued = QueuedAnswer()
        self._answers.append(queued)
        self._worker.submit(self._run, queued, work)
        return queued

    def leave(self, queued: QueuedAnswer) -> None:
        """For a client that went away: its answer ends at the next token, or leaves the queue at once."""
        queued.stopped.set()
        if queued in self._answers[1:]:
            self._answers.remove(queued)

    async def events(self, queued: QueuedAnswer) -> AsyncIterator[Event]:
        """An answer's events as they come, and how many answers are before it while it waits."""
        while True:
            try:
                event = await asyncio.wait_for(queued.events.get(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                before = self._answers.index(queued) if queued in self._answers else 0
                event = {"event": "waiting", "before": before}
            if event is None:
                return
            yield event

    def close(self) -> None:
        """Ends everything; the running answer at its next token."""
        for queued in self._answers:
            queued.stopped.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _run(self, queued: QueuedAnswer, work: Callable[[QueuedAnswer], None]) -> None:
        try:
            if not queued.stopped.is_set():
                work(queued)
        except PhatgooseError as error:
            queued.send({"event": "error", "message": str(error)})
        except Exception as error:
            # The operator must see the error, and the page must not wait forever.
            logging.getLogger(__name__).exception("an answer failed")
            queued.send({"event": "error", "message": f"{type(error).__name__}; the terminal says more."})
        finally:
            queued.call_soon(self._done, queued)

    def _done(self, queued: QueuedAnswer) -> None:
        if queued in self._answers:
            self._answers.remove(queued)
        queued.send(None)
