"""One training from start to end: folder, rows, model, loop, result, record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.extras import installed_versions
from phatgoose.files import atomic_folder, work_place
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.text.capabilities import check_scorable
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.tasks.load import without_paths
from phatgoose.training.student import Student, autocast_dtype
from phatgoose.training.trainer.arguments import Logger, broadcast_value, trainer_arguments
from phatgoose.training.trainer.checkpoints import History, RunFolder
from phatgoose.training.trainer.job import TrainingJob
from phatgoose.training.trainer.loop import Loop, copy_into_trained
from phatgoose.training.trainer.preserve import preserved, preserved_random_state
from phatgoose.training.trainer.progress import Report, display, silent
from phatgoose.training.trainer.rows import TrainingRows, training_rows

CURVE_POINTS = 100


def run_training(
    job: TrainingJob, work_folder: str | Path | None, report: Report | None, loggers: Sequence[Logger]
) -> Expert:
    """Trains the job, continues it from a checkpoint, or reads the result that an earlier call finished."""
    base, config = job.base, job.config
    if routing_of(base) is not None:
        raise TrainingError("routing is attached to the base: call unroute(base) before training on it.")
    autocast_dtype(base.model, config)
    check_scorable(base.model)
    rows = training_rows(base, job.task, config)
    with preserved_random_state(), work_place(work_folder) as folder:
        args = trainer_arguments(base, config, folder, loggers)
        run_folder = RunFolder(folder, job.kind, job.key())
        run_folder.check(job.result)
        if (record := broadcast_value(run_folder.finished(job.result))) is not None:
            return job.read(folder / job.result, record)
        if args.should_save:
            run_folder.claim()
        with preserved(base.model):
            student = job.build()
            with _reporting(report, job, args.should_save) as show:
                kept = run_folder if work_folder is not None else None
                loop = Loop(job, student, rows, args, kept, show, loggers)
                loop.run()
            copy_into_trained(student, loop.best)
            if not all(bool(p.isfinite().all()) for p in student.trained().values()):
                raise TrainingError(
                    f"{job.label}: the trained weights hold NaN or infinity; lower learning_rate."
                )
            return _finish(job, student, run_folder, _record(job, rows, loop.history, student))


def _finish(job: TrainingJob, student: Student, run_folder: RunFolder, record: dict[str, Any]) -> Expert:
    """The first process writes the result. The others hold the same weights and read a temporary copy of their own."""
    state = PartialState()
    if state.is_main_process:
        with atomic_folder(run_folder.work / job.result) as work:
            job.write(student, work)
        expert = job.read(run_folder.work / job.result, record)
        run_folder.finish(job.result, record)
    else:
        with work_place(None) as own:
            job.write(student, own)
            expert = job.read(own, record)
    state.wait_for_everyone()
    return expert


def _record(job: TrainingJob, rows: TrainingRows, history: History, student: Student) -> dict[str, Any]:
    """The result's provenance."""
    task, config, base = job.task, job.config, job.base
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
        "versions": installed_versions("phatgoose", "torch", "transformers", "peft", "accelerate"),
        "validation_losses": [[int(step), loss] for step, loss in history.validation.items()],
        "best_step": history.best_step if history.best_step is not None else config.steps,
        "losses": loss_curve(history.losses),
        "seconds": round(history.seconds, 3),
        "tokens": rows.tokens,
        "target_tokens": rows.target_tokens,
        "parameters": sum(p.numel() for p in student.trained().values()),
        "seed": config.seed,
        "device": _device_name(base.device),
        "precision": str(student.autocast or torch.float32).removeprefix("torch."),
        "processes": PartialState().num_processes,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def loss_curve(losses: Sequence[float]) -> list[list[float]]:
    """At most CURVE_POINTS pairs (last step of a stretch, mean loss of the stretch)."""
    width = -(-len(losses) // CURVE_POINTS) or 1
    stretches = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [
        [min((i + 1) * width, len(losses)), round(sum(part) / len(part), 5)]
        for i, part in enumerate(stretches)
    ]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def _reporting(report: Report | None, job: TrainingJob, is_first: bool) -> Iterator[Report]:
    """The caller's report; else a display in the first process and nothing in the others."""
    if report is not None:
        yield report
    elif not is_first:
        yield silent
    else:
        with display(job.label, job.config.steps) as show:
            yield show
