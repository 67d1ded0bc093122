"""The live table of an experiment on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from phatgoose.workflows.experiment.executors import State, Step, Tell

SHOWN = 8


class Board:
    """Shows a line for each stage, the steps that run, and the last failures."""

    def __init__(self, console: Console):
        self.console = console
        self.stages: dict[str, dict[str, str]] = {}
        self.started: dict[str, float] = {}
        self.problems: list[tuple[str, str]] = []
        self._times: dict[str, tuple[float, float | None]] = {}
        self._live = (
            Live(self, console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        )

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def stage(self, name: str, steps: Sequence[Step]) -> Tell:
        """Begins a stage; returns the `tell` that its executor calls."""
        self.stages[name] = {step.name: "waiting" for step in steps}
        self._times[name] = (time.monotonic(), None)
        if self._live is None:
            self.console.print(f"{name}: {len(steps)} steps", highlight=False)
        return partial(self.tell, name)

    def tell(self, stage: str, step: Step, state: State, why: str) -> None:
        states = self.stages[stage]
        states[step.name] = state
        if state == "running":
            self.started[step.name] = time.monotonic()
        if all(s in ("done", "failed") for s in states.values()):
            self._times[stage] = (self._times[stage][0], time.monotonic())
        if state in ("failed", "retry"):
            self.problems.append((f"{step.name}: {state}", why))
        if self._live is None and state not in ("queued", "running"):
            # Unknown if a step elsewhere began and ended before its beginning was reported.
            started = self.started.get(step.name)
            took = "" if started is None else f" ({time.monotonic() - started:.0f} s)"
            self.console.print(
                f"  {step.name}: {state}" + (took if state == "done" else f": {why}"),
                highlight=False,
                markup=False,
            )

    def __rich__(self) -> Group:
        table = Table(
            "stage", "done", "running", "failed", "time", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        now = time.monotonic()
        for name, states in self.stages.items():
            counts = list(states.values())
            start, end = self._times[name]
            failed, queued = counts.count("failed"), counts.count("queued")
            running = f"{counts.count('running')}" + (f" ({queued} sent)" if queued else "")
            table.add_row(
                name, f"{counts.count('done')}/{len(counts)}", running,
                Text(str(failed), style="red" if failed else ""), f"{(end or now) - start:.0f} s",
            )  # fmt: skip
        lines = [
            Text(f"  {step}  {now - self.started[step]:.0f} s", style="dim")
            for states in self.stages.values() for step, state in states.items() if state == "running"
        ][:SHOWN]  # fmt: skip
        lines += [Text(f"  {what}: {why}", style="red") for what, why in self.problems[-3:]]
        return Group(table, *lines)
