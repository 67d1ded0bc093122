"""What one training consists of, and how it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from phatgoose.experts.expert import Expert
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.records import Task
from phatgoose.training.config import LoopConfig
from phatgoose.training.student import Student
from phatgoose.training.trainer.arguments import Logger
from phatgoose.training.trainer.progress import Report


class RunOptions(TypedDict, total=False):
    """How a training runs, whatever it trains; explained at `train_expert`."""

    work_folder: str | Path | None
    report: Report | None
    loggers: Sequence[Logger]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What to train and how to build, write and read it. `run_training` does the rest."""

    kind: str
    """"expert" or "gate"."""
    label: str
    """What progress shows, e.g. "expert plural"."""
    result: str
    """Name of the result's folder in the work folder."""
    base: Base
    task: Task
    config: LoopConfig
    build: Callable[[], Student]
    """Makes the model, inside `preserved`."""
    write: Callable[[Student, Path], None]
    """Writes the result's files."""
    read: Callable[[Path, dict[str, Any]], Expert]
    """Reads them, with the record."""
    extra_key: dict[str, Any] = field(default_factory=dict)
    """What the result depends on beside config, task and base."""

    def key(self) -> dict[str, Any]:
        """Everything that the result depends on: a work folder with another key is refused."""
        return {
            "config": self.config.key(),
            "task": self.task.hash,
            "base": self.base.facts(),
            **chat_template_key(self.base, self.task),
            **self.extra_key,
        }
