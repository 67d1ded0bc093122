"""Progress of a training: one record per step, shown as a bar or as lines."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

QUIET_SECONDS = 60.0
"""The longest time without a line, if progress is printed as lines."""


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    label: str
    """What is being trained, e.g. "expert plural"."""
    step: int
    steps: int
    loss: float | None = None
    """Loss of the last step, in nats per target token; None before the first."""
    validation_loss: float | None = None
    """The last one, in nats per target token; None before the first."""
    rows_per_second: float = 0.0
    """Over all processes, since this process began (steps before a resume don't count)."""
    seconds_left: float = math.inf
    """Infinite before the first step."""
    part: float = 0.0
    """Share of the next step that is done, in [0, 1): above 0 only in reports from within a long step."""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def display(label: str, steps: int, report: Report | None = None) -> Iterator[Report]:
    """`report`; without one, a progress bar on standard error if that is a terminal, else `lines`."""
    if report is None and not sys.stderr.isatty():
        report = lines()
    if report is not None:
        yield report
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(label, total=steps, text="")

        def show(progress: object) -> None:
            bar.update(task, completed=progress.step + progress.part, text=_describe(progress))  # type: ignore[attr-defined, arg-type]

        yield show


def lines() -> Report:
    """Prints a line on standard error at every tenth of the way, and `QUIET_SECONDS` after the last line."""
    printed = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal printed
        tenth = max(1, progress.steps // 10)
        due = progress.step == progress.steps or (progress.step % tenth == 0 and not progress.part)
        if due or time.monotonic() - printed >= QUIET_SECONDS:
            printed = time.monotonic()
            print(f"{progress.label}: {_describe(progress)}", file=sys.stderr, flush=True)

    return show


def _describe(progress: Progress) -> str:
    within = f" and {progress.part:.0%} of a step" if progress.part else ""
    parts = [f"{progress.step}/{progress.steps}{within}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.validation_loss is not None:
        parts.append(f"validation {progress.validation_loss:.3f}")
    if progress.rows_per_second:
        parts.append(f"{progress.rows_per_second:.3g} rows/s")
    if progress.step < progress.steps and math.isfinite(progress.seconds_left):
        parts.append(f"{_duration(progress.seconds_left)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d}h"
