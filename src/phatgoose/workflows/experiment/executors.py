"""Run independent steps in parallel: a dead worker or a failed step costs that step only.

A step is a function's name and plain arguments, so any process that can import phatgoose can run it. A step writes
what it makes to disk and returns little. `Processes` is the default; `ray_executor.RayExecutor` spreads steps over
a cluster.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from phatgoose.errors import PhatgooseError

State = Literal["queued", "running", "done", "retry", "failed"]
Tell = Callable[["Step", State, str], None]


@dataclass(frozen=True)
class Step:
    """One piece of work."""

    name: str
    """What people see; unique among the steps of one run."""
    function: str
    """module:function, called with `arguments`."""
    arguments: Mapping[str, Any]
    """Plain data: it is pickled."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    value: Any = None
    error: str | None = None
    attempts: int = 1

    @property
    def ok(self) -> bool:
        return self.error is None


Begun = Mapping[Any, tuple[Step, int]]
"""Handle → a step that has begun, and the number of its attempt."""


class Executor:
    """Runs steps: one after the other in this process, unless a subclass says otherwise.

    Args:
        retries: how often a step is run again that raised an error that may not come again.
    """

    def __init__(self, retries: int = 0):
        self.retries = retries

    def run(self, steps: Sequence[Step], tell: Tell) -> dict[str, Outcome]:
        """Runs all steps, in any order: name → outcome. Calls `tell` on every change, and raises for no failed step."""
        waiting = [(step, 1) for step in steps][::-1]
        begun: dict[Any, tuple[Step, int]] = {}
        found: dict[str, Outcome] = {}
        while waiting or begun:
            while waiting and self.has_room(begun):
                step, number = waiting.pop()
                begun[self.start(step, begun, tell)] = step, number
            for handle, kind, value in self.finished(begun, tell):
                step, number = begun.pop(handle)
                if kind == "ok":
                    found[step.name] = Outcome(value, attempts=number)
                    tell(step, "done", "")
                elif kind == "refused" or number > self.retries:
                    found[step.name] = Outcome(error=value, attempts=number)
                    tell(step, "failed", value)
                else:
                    waiting.append((step, number + 1))
                    tell(step, "retry", value)
        return found

    def has_room(self, begun: Begun) -> bool:
        """Whether another step can be started beside those that have begun."""
        return not begun

    def start(self, step: Step, begun: Begun, tell: Tell) -> Any:
        """Starts a step and returns a handle of it."""
        tell(step, "running", "")

    def finished(self, begun: Begun, tell: Tell) -> list[tuple[Any, str, Any]]:
        """(handle, kind, value) of steps that have ended, kind and value as `attempt` gives them; waits for one."""
        return [(handle, *attempt(s.function, s.arguments)) for handle, (s, _) in begun.items()]

    def close(self) -> None:
        """Frees workers and connections."""


def attempt(function: str, arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """("ok", value), ("refused", why) for an error that a retry would repeat, or ("error", why) for another."""
    module, _, name = function.partition(":")
    try:
        return "ok", getattr(importlib.import_module(module), name)(**arguments)
    except Exception as error:
        return "refused" if isinstance(error, PhatgooseError) else "error", why(error)


def why(error: Exception) -> str:
    """What went wrong, in one line; with file and line unless it is a PhatgooseError."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, PhatgooseError):
        return said
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({os.path.basename(where.filename)}:{where.lineno})"


class Processes(Executor):
    """Worker processes on this machine, each taking one step at a time and keeping what it loaded for the next."""

    def __init__(
        self, workers: int, *, gpus: int = 0, retries: int = 1, environment: Mapping[str, str] | None = None
    ):
        if workers < 1 or retries < 0:
            raise PhatgooseError(f"{workers} workers and {retries} retries: expected at least 1 and 0.")
        # The number of threads decides the order of sums, so the last bits. With it set, numbers are the same anywhere.
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
        own = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
        visible = _gpus()
        if gpus > len(visible):
            raise PhatgooseError(f"this machine shows {len(visible)} GPUs, so {gpus} can't be dealt out.")
        if visible and workers > 1 and not gpus:
            raise PhatgooseError(
                f"{workers} workers would all take the first of {len(visible)} GPUs: say how many they share "
                "(--gpus 1), or hide them (CUDA_VISIBLE_DEVICES= )."
            )
        super().__init__(retries)
        self.settings = [
            own | ({"CUDA_VISIBLE_DEVICES": visible[n % gpus]} if gpus else {}) for n in range(workers)
        ]
        self._workers: dict[int, _Worker] = {}

    def has_room(self, begun: Begun) -> bool:
        return len(begun) < len(self.settings)

    def start(self, step: Step, begun: Begun, tell: Tell) -> int:
        place = next(n for n in range(len(self.settings)) if n not in begun)
        try:
            self._worker(place).send(step)
        except OSError:  # it died just now, idle: the step is the next one's
            self._workers.pop(place).stop()
            self._worker(place).send(step)
        tell(step, "running", f"worker {place + 1}")
        return place

    def close(self) -> None:
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()

    def _worker(self, place: int) -> _Worker:
        worker = self._workers.get(place)
        if worker is None or not worker.process.is_alive():
            worker = self._workers[place] = _Worker(self.settings[place])
        return worker

    def finished(self, begun: Begun, tell: Tell) -> list[tuple[Any, str, Any]]:
        workers = {place: self._workers[place] for place in begun}
        # A worker's death shows at its sentinel, an answer at its connection; both may be there at once.
        ready = set(wait([x for w in workers.values() for x in (w.connection, w.process.sentinel)]))
        results = []
        for place, worker in workers.items():
            if worker.connection in ready or worker.process.sentinel in ready:
                results.append((place, *worker.receive()))
                if not worker.process.is_alive():
                    self._workers.pop(place).stop()
        return results


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    count = torch.cuda.device_count()
    return named[:count] or [str(g) for g in range(count)]


class _Worker:
    def __init__(self, environment: Mapping[str, str]):
        # Spawned, not forked: torch's threads and CUDA don't survive a fork.
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        kept = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)  # the child reads it before its first import
        try:
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def send(self, step: Step) -> None:
        self.connection.send((step.function, dict(step.arguments)))

    def receive(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            killed = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return "died", f"the worker process died ({killed}); out of memory, if nobody killed it"

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()


def _serve(connection: Connection) -> None:
    """A worker's life: steps in, outcomes out, until the other end closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            connection.send(attempt(function, arguments))
        except KeyboardInterrupt:
            return


def _end_with_parent() -> None:
    """Or the step of a killed run would go on for its hour, beside the next run's workers."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
