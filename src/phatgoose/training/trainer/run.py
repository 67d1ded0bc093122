"""One training from beginning to end: folder, rows, model, loop, result, record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.extras import installed_versions
from phatgoose.files import atomic_folder, work_place
from phatgoose.models.base.base import Base
from phatgoose.models.text.capabilities import check_scorable
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.records import Task
from phatgoose.tasks.spec import without_paths
from phatgoose.training.config import LoopConfig
from phatgoose.training.student import Student, autocast_dtype
from phatgoose.training.trainer.arguments import Logger, broadcast_value, trainer_arguments
from phatgoose.training.trainer.checkpoints import History, RunFolder
from phatgoose.training.trainer.loop import Loop, copy_into_trained
from phatgoose.training.trainer.preserve import preserved, preserved_random_state
from phatgoose.training.trainer.progress import Report, display, silent
from phatgoose.training.trainer.rows import TrainingRows, training_rows

CURVE_POINTS = 100


@dataclass(frozen=True)
class TrainingJob:
    """What is to be trained, and how its parts are made."""

    kind: str
    """"expert" or "gate"."""
    result: str
    """Name of the result's folder."""
    base: Base
    task: Task
    config: LoopConfig
    key: dict[str, Any]
    """What else decides the result, beyond config, task and base."""
    build: Callable[[], Student]
    """Makes the model, inside `preserved`."""
    write: Callable[[Student, Path], None]
    """Writes the result's files."""
    read: Callable[[Path, dict[str, Any]], Expert]
    """Reads them, with the record."""

    def full_key(self) -> dict[str, Any]:
        return {
            "config": self.config.key(),
            "task": self.task.hash,
            "base": self.base.facts(),
            **chat_template_key(self.base, self.task),
            **self.key,
        }


def run_training(
    job: TrainingJob, work_folder: Path | None, label: str, report: Report | None, loggers: Sequence[Logger]
) -> Expert:
    """Trains, or continues, or reads what was finished before."""
    base, config = job.base, job.config
    if base.model.__dict__.get("_phatgoose_routing") is not None:
        raise TrainingError("routing is attached to the base: call unroute(base) before training on it.")
    autocast_dtype(base.model, config)
    check_scorable(base.model)
    rows = training_rows(base, job.task, config)
    with preserved_random_state(), work_place(work_folder) as folder:
        args = trainer_arguments(base, config, folder, loggers)
        keep = RunFolder(folder, job.kind, job.full_key())
        keep.check(job.result)
        if (record := broadcast_value(keep.finished(job.result))) is not None:
            return job.read(folder / job.result, record)
        if args.should_save:
            keep.claim()
        with preserved(base.model):
            student = job.build()
            with _shown(report, label, config.steps, args.should_save) as show:
                loop = Loop(
                    student,
                    base,
                    rows,
                    config,
                    args,
                    keep if work_folder else None,
                    label=label,
                    report=show,
                    loggers=loggers,
                )
                loop.run()
            copy_into_trained(student, loop.best)
            if not all(bool(p.isfinite().all()) for p in student.trained().values()):
                raise TrainingError(
                    f"{label}: the trained weights hold NaN or infinity; lower learning_rate."
                )
            record = _record(job, rows, loop.history, student)
            return _finish(job, student, keep, record)


def _finish(job: TrainingJob, student: Student, keep: RunFolder, record: dict[str, Any]) -> Expert:
    """The first process writes the result; the others, which hold the same weights, read their own copy of it."""
    state = PartialState()
    if state.is_main_process:
        with atomic_folder(keep.work / job.result) as work:
            job.write(student, work)
        expert = job.read(keep.work / job.result, record)
        keep.finish(job.result, record)
    else:
        with work_place(None) as own:
            job.write(student, own)
            expert = job.read(own, record)
    state.wait_for_everyone()
    return expert


def _record(job: TrainingJob, rows: TrainingRows, history: History, student: Student) -> dict[str, Any]:
    """How it was made."""
    task, config, base = job.task, job.config, job.base
    packages = ("phatgoose", "torch", "transformers", "peft", "accelerate")
    return {
        "kind": job.kind,
        "base": base.fingerprint.to_json(),
        "task": {
            "name": task.name,
            "source": without_paths(task.source),
            "hash": task.hash,
            **chat_template_key(base, task),
            "rows": {
                "train": len(task.train),
                "validation": len(task.validation),
                "test": len(task.test),
                "used": len(rows.train.encoded),
                "used_for_validation": len(rows.validation),
                "truncated": rows.truncated,
            },
        },
        "config": config.to_json(),
        "versions": installed_versions(*packages),
        "validation_losses": [[int(step), loss] for step, loss in history.validation.items()],
        "best_step": history.best_step if history.best_step is not None else config.steps,
        "losses": curve(history.losses),
        "seconds": round(history.seconds, 3),
        "tokens": rows.tokens,
        "target_tokens": rows.target_tokens,
        "parameters": sum(p.numel() for p in student.trained().values()),
        "seed": config.seed,
        "device": _device(base.device),
        "precision": str(student.autocast or torch.float32).removeprefix("torch."),
        "processes": PartialState().num_processes,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def curve(losses: Sequence[float]) -> list[list[float]]:
    """At most CURVE_POINTS pairs of (last step of a stretch, mean loss of that stretch)."""
    width = -(-len(losses) // CURVE_POINTS) or 1
    stretches = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [
        [min((i + 1) * width, len(losses)), round(sum(part) / len(part), 5)]
        for i, part in enumerate(stretches)
    ]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def _shown(report: Report | None, label: str, steps: int, first: bool) -> Iterator[Report]:
    if report is not None:
        yield report
    elif not first:
        yield silent
    else:
        with display(label, steps) as show:
            yield show
