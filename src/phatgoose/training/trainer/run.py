"""One training from start to end: folder, rows, model, loop, result, record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.extras import installed_versions
from phatgoose.files import atomic_folder, work_place
from phatgoose.models.text.capabilities import check_scorable
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.tasks.load import without_paths
from phatgoose.training.student import Student, autocast_dtype
from phatgoose.training.trainer.checkpoints import History, RunFolder
from phatgoose.training.trainer.job import TrainingJob, broadcast_value
from phatgoose.training.trainer.loop import Loop
from phatgoose.training.trainer.preserve import preserved, preserved_random_state, refuse_routed
from phatgoose.training.trainer.progress import display, silent
from phatgoose.training.trainer.rows import TrainingRows, training_rows

CURVE_POINTS = 100


def run_training(job: TrainingJob) -> Expert:
    """Trains the job, continues it from a checkpoint, or reads the result that an earlier call finished."""
    base, work_folder, report = job.base, job.options.get("work_folder"), job.options.get("report")
    refuse_routed(base)
    autocast_dtype(base.model, job.config)
    check_scorable(base.model)
    rows = training_rows(base, job.task, job.config)
    with preserved_random_state(), work_place(work_folder) as folder:
        args = job.trainer_arguments(folder)
        run_folder = RunFolder(folder, job.kind, job.result, job.key())
        run_folder.claim(args.should_save)
        if (record := broadcast_value(run_folder.finished())) is not None:
            return job.read(run_folder.result, record)
        if report is None and not args.should_save:
            report = silent
        with preserved(base.model):
            student = job.build()
            with display(job.label, job.config.steps, report) as show:
                loop = Loop(job, student, rows, args, None if work_folder is None else run_folder, show)
                loop.run()
            student.load_trained(loop.best)
            if not all(bool(p.isfinite().all()) for p in student.trained().values()):
                raise TrainingError(
                    f"{job.label}: the trained weights hold NaN or infinity; lower learning_rate."
                )
            return _finish(job, student, run_folder, _record(job, rows, loop.history, student))


def _finish(job: TrainingJob, student: Student, run_folder: RunFolder, record: dict[str, Any]) -> Expert:
    """The first process writes the result. The others hold the same weights and read a temporary copy of their own."""
    state = PartialState()
    if state.is_main_process:
        with atomic_folder(run_folder.result) as work:
            student.save(work)
        expert = job.read(run_folder.result, record)
        run_folder.finish(record)
    else:
        with work_place(None) as own:
            student.save(own)
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
                "used": len(rows.encoded),
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
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        "precision": str(student.autocast or torch.float32).removeprefix("torch."),
        "processes": PartialState().num_processes,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def loss_curve(losses: Sequence[float]) -> list[list[float]]:
    """At most CURVE_POINTS pairs (last step of a stretch, mean loss of the stretch)."""
    width = -(-len(losses) // CURVE_POINTS) or 1
    curve = []
    for start in range(0, len(losses), width):
        part = losses[start : start + width]
        curve.append([start + len(part), round(sum(part) / len(part), 5)])
    return curve
