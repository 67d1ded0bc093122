"""Run steps as Ray tasks, on this machine or a cluster whose nodes share the folders."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from phatgoose.errors import PhatgooseError
from phatgoose.extras import install
from phatgoose.workflows.experiment.executors import Outcome, Step, Tell, attempt, settled

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


class RayExecutor:
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
        self.ray, self.retries = ray, retries
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

    def run(self, steps: Sequence[Step], tell: Tell) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        pending: dict[Any, tuple[Step, int]] = {}

        def submit(step: Step, number: int) -> None:
            sent = self._attempt.options(name=step.name).remote(
                os.getcwd(), self._begun, step.name, step.function, dict(step.arguments)
            )
            pending[sent] = step, number
            tell(step, "queued", "with Ray")

        for step in steps:
            submit(step, 1)
        while pending:
            # A short wait, so that the board learns in between which steps have begun.
            ready, _ = self.ray.wait(list(pending), num_returns=1, timeout=_LOOK_SECONDS)
            waiting = {step.name: step for step, _ in pending.values()}
            for name, where in self._just_begun():
                if name in waiting:
                    tell(waiting[name], "running", where)
            for reference in ready:
                step, number = pending.pop(reference)
                kind, value = self._result(reference)
                if outcome := settled(step, number, kind, value, self.retries, tell):
                    found[step.name] = outcome
                else:
                    submit(step, number + 1)
        return found

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
