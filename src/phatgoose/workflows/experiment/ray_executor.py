"""Run steps as Ray tasks, on this machine or a cluster whose nodes share the folders."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

from phatgoose.errors import PhatgooseError
from phatgoose.extras import install
from phatgoose.workflows.experiment.executors import Begun, Executor, Step, Tell, attempt

_LOOK_SECONDS, _ANSWER_SECONDS = 1.0, 0.2


class _Begun:
    """An actor that workers tell which step they begin: Ray itself doesn't say which tasks already run."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def say(self, step: str, where: str) -> None:
        self.said.append((step, where))

    def take(self) -> list[tuple[str, str]]:
        said, self.said = self.said, []
        return said


def _attempt_in(
    folder: str, begun: Any, name: str, function: str, arguments: Mapping[str, Any]
) -> tuple[str, Any]:
    """`attempt` in the driver's current folder, for relative paths: a cluster's workers start elsewhere."""
    begun.say.remote(name, platform.node())
    if os.path.isdir(folder):
        os.chdir(folder)
    return attempt(function, arguments)


class RayExecutor(Executor):
    """Runs every step as a Ray task with its own request for CPUs and GPUs.

    If a worker process dies, Ray starts its task again, up to `retries` times. A step that raised an error that may
    not come again is resubmitted here. Worker processes are reused and keep what they loaded, except those with a
    GPU.

    Args:
        address: of a running cluster ("auto", "ray://host:10001"); None starts Ray on this machine for this run.
        cpus, gpus: what one step asks for. Fractions of a GPU let several steps share it.
    """

    def __init__(self, address: str | None = None, *, cpus: float = 1, gpus: float = 0, retries: int = 1):
        try:
            import ray
        except ImportError as cause:
            raise PhatgooseError(f"--ray needs Ray: {install('ray')}") from cause
        if gpus > 1 and gpus != int(gpus):
            raise PhatgooseError(f"a step asks for {gpus:g} GPUs: Ray gives a part of one, or whole ones.")
        super().__init__(retries)
        self.ray = ray
        self._begun: Any = None
        self._asked: Any = None
        self._started = not ray.is_initialized()
        if self._started:
            settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
            if address is None:  # without an address, Ray would join a cluster that it finds
                settings |= {"include_dashboard": False}
            try:
                ray.init(address=address or "local", **settings)
            except (ConnectionError, RuntimeError, ValueError) as cause:
                raise PhatgooseError(
                    f"can't reach Ray{f' at {address}' if address else ''}: {cause}"
                ) from cause
        if address is None:
            self._check(cpus, gpus)
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries}
        if not gpus:  # a reused process would keep its first GPU even if Ray gave it another
            options["max_calls"] = 0
        self._attempt = ray.remote(**options)(_attempt_in)
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Begun)
        self._begun = actor.remote()

    def _check(self, cpus: float, gpus: float) -> None:
        """Refuses steps that ask for more than this machine has: they would wait for ever. (A cluster may grow.)"""
        there = self.ray.cluster_resources()
        for name, asked in (("CPU", cpus), ("GPU", gpus)):
            if asked > there.get(name, 0):
                self.close()
                raise PhatgooseError(
                    f"a step asks for {asked:g} {name}s, and this machine has {there.get(name, 0):g}."
                )

    def has_room(self, begun: Begun) -> bool:
        return True

    def start(self, step: Step, begun: Begun, tell: Tell) -> Any:
        tell(step, "queued", "with Ray")
        return self._attempt.options(name=step.name).remote(
            os.getcwd(), self._begun, step.name, step.function, dict(step.arguments)
        )

    def finished(self, begun: Begun, tell: Tell) -> list[tuple[Any, str, Any]]:
        # A short wait, so that the board learns in between which steps have begun.
        ready, _ = self.ray.wait(list(begun), num_returns=1, timeout=_LOOK_SECONDS)
        running = {step.name: step for step, _ in begun.values()}
        for name, where in self._just_begun():
            if name in running:
                tell(running[name], "running", where)
        return [(reference, *self._result(reference)) for reference in ready]

    def _just_begun(self) -> list[tuple[str, str]]:
        """The steps that began since the last answer. An answer that isn't there yet is taken the next time."""
        self._asked = self._asked or self._begun.take.remote()
        if not self.ray.wait([self._asked], timeout=_ANSWER_SECONDS)[0]:
            return []
        answer, self._asked = self._asked, None
        try:
            return self.ray.get(answer)
        except self.ray.exceptions.RayError:
            return []  # the actor's node died: for a moment, running steps aren't shown

    def close(self) -> None:
        if self._started:
            self.ray.shutdown()
        elif self._begun is not None:
            self.ray.kill(self._begun)

    def _result(self, reference: Any) -> tuple[str, Any]:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            # The worker or its node died, more often than `retries` allows: Ray itself tried again.
            why = (str(error).splitlines() or ["the worker died"])[0]
            return "refused", f"{type(error).__name__}: {why}"
