"""`phatgoose gate --generated`: texts that the base writes, in place of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from phatgoose.cli.common.options import RunOptions, WritingOptions
from phatgoose.cli.measure import show
from phatgoose.errors import TaskError
from phatgoose.experts.expert import Expert
from phatgoose.files import sha256_json
from phatgoose.models.base.base import Base
from phatgoose.records import Task
from phatgoose.training.config import WritingConfig
from phatgoose.training.generated import write_task


@dataclass(frozen=True)
class WantedTexts:
    """Texts that are to be written."""

    config: WritingConfig
    prompts: tuple[str, ...]

    def made(self, record: Mapping[str, Any]) -> bool:
        """Whether a gate's record says that it was trained on such texts."""
        try:
            source = record["task"]["source"]
            prompts = (source["prompts"] or {}).get("sha256")
            same = source["source"] == "generated" and source["config"] == asdict(self.config)
            return bool(same and prompts == (sha256_json(list(self.prompts)) if self.prompts else None))
        except (KeyError, TypeError, AttributeError):  # somebody else's record
            return False

    def task(self, base: Base, expert: Expert, work: Path) -> Task:
        """The texts as a task, with what became of them on standard error."""
        task = write_task(base, expert, self.config, prompts=self.prompts, work_folder=work)
        counts = task.source["texts"]
        show.note(
            "texts: "
            + ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items() if number)
        )
        return task


def wanted_texts(options: WritingOptions, run: RunOptions, task: str | None, seed: int) -> WantedTexts | None:
    """The texts that the options ask for; None if they name a task.

    Raises:
        BadParameter: both or neither of task and --generated, or options that go with --generated only.
        TaskError: the file of prompts can't be read or is empty. TrainingError: a setting is out of range.
    """
    generated, prompts = options.generated, options.prompts
    if generated == (task is not None):
        raise typer.BadParameter("give the expert's --task, or --generated if its data are not at hand.")
    config = WritingConfig(
        rows=options.texts, max_new_tokens=options.text_tokens, temperature=options.temperature, seed=seed
    )
    if generated:
        if run.limit_train is not None:
            raise typer.BadParameter("--limit-train is for a task's rows; with --generated, say --texts.")
        return WantedTexts(config, lines(prompts) if prompts is not None else ())
    if prompts is not None or config != WritingConfig(seed=seed):
        raise typer.BadParameter("--prompts, --texts, --text-tokens and --temperature go with --generated.")
    return None


def lines(file: Path) -> tuple[str, ...]:
    """The prompts in a file, one a line; a line break inside a prompt is written \\n there."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise TaskError(f"{file} can't be read as text: {cause}.") from cause
    found = tuple(line.strip().replace("\\n", "\n") for line in text.splitlines() if line.strip())
    if not found:
        raise TaskError(f"{file} has no prompts: write one a line.")
    return found
