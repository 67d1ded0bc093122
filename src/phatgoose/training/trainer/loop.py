"""transformers' Trainer with exact token means, our own checkpoints and our own progress."""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from phatgoose.errors import TrainingError
from phatgoose.files import read_json
from phatgoose.models.text.batch import length_batches, make_batch
from phatgoose.training.student import Student
from phatgoose.training.trainer import checkpoints
from phatgoose.training.trainer.checkpoints import History, RunFolder, state_bytes, tensor_bytes
from phatgoose.training.trainer.job import TrainingJob, broadcast_value
from phatgoose.training.trainer.progress import Progress, Report
from phatgoose.training.trainer.rows import TrainingRows

ADVICE = (
    "lower learning_rate, set max_grad_norm=1.0, or compute in float32. Nothing of this step was written."
)
WITHIN_SECONDS = 15.0
"""A step that takes longer than this reports progress within the step."""


class Loop(Trainer):
    """One training. Its outcome is `best`, the trained tensors, and `history`."""

    def __init__(
        self,
        job: TrainingJob,
        student: Student,
        rows: TrainingRows,
        args: TrainingArguments,
        run_folder: RunFolder | None,
        report: Report,
    ) -> None:
        self.collate = lambda encoded: make_batch(job.base, encoded)
        loggers = [c for c in job.options.get("loggers", ()) if isinstance(c, TrainerCallback)]
        try:
            super().__init__(
                model=student,
                args=args,
                data_collator=self.collate,
                train_dataset=rows.train,
                callbacks=[LoopCallback(self, report), *loggers],
            )
        except (ValueError, RuntimeError, ImportError) as cause:
            raise TrainingError(f"the training can't be set up: {cause}") from cause
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        mixed = self.accelerator.mixed_precision not in (None, "no")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or mixed:
            raise TrainingError(
                "FSDP, DeepSpeed and accelerate's mixed precision are not supported: launch with torchrun or plain "
                "`accelerate launch --multi_gpu --mixed_precision no` (precision is a setting of the config)."
            )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the targets of the whole step
        self.config, self.label, self.rows, self.run_folder = job.config, job.label, rows, run_folder
        self.history, self.best = History(), dict[str, Tensor]()
        self.step_loss = torch.zeros((), device=args.device)
        self.started = time.monotonic()

    def run(self) -> None:
        """Trains to the end, starting from the last whole checkpoint if there is one.

        A TrainingError names the step whose loss isn't finite.
        """
        checkpoint = broadcast_value(str(self.run_folder.last_checkpoint() or "") if self.run_folder else "")
        self.train(resume_from_checkpoint=checkpoint or None)
        self.history.seconds = self.seconds()
        if not self.config.validate_every:
            self.best = self._copy_trained()

    @property
    def student(self) -> Student:
        return self.model  # type: ignore[return-value]  # never wrapped: DDP's wrapper is model_wrapped

    def seconds(self) -> float:
        return self.history.seconds + time.monotonic() - self.started

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's share of the mean over all targets of the step, over all its batches and processes."""
        # DDP averages the gradients of its processes; they must be summed.
        loss = model(**inputs) / num_items_in_batch * self.accelerator.num_processes
        self.step_loss += loss.detach()
        return loss

    def take_step_loss(self) -> float:
        """The loss of the step that has just ended, the same in all processes."""
        loss = float(self.accelerator.reduce(self.step_loss.clone(), reduction="mean"))
        self.step_loss.zero_()
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all targets of the validation rows. Copies the trained tensors if it is the lowest."""
        step, history = self.state.global_step, self.history
        loss = self._validation_loss()
        if not math.isfinite(loss):
            raise TrainingError(f"the validation loss is {loss} at step {step}: {ADVICE}")
        if (
            history.best_step is None
            or loss < history.validation[str(history.best_step)]
            or not self.best  # resumed from a checkpoint without them
        ):
            history.best_step, self.best = step, self._copy_trained()
        history.validation[str(step)] = loss
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.student.eval()
        rows = self.rows.validation
        batches = list(length_batches([row.length for row in rows], self.config.rows_per_batch))
        total = 0.0
        for indices in batches[self.args.process_index :: self.args.world_size]:
            batch = self.collate([rows[i] for i in indices])
            total += float(self.student(**{k: t.to(self.args.device) for k, t in batch.items()}))
        if self.args.world_size > 1:
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.args.device)))
        return total / sum(len(row.target_ids) for row in rows)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's hook for saving: the same state, in our own checkpoint."""
        if self.run_folder is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            if self.args.should_save:
                self.state.save_to_json(str(Path(folder, "trainer_state.json")))
            own = [(file.name, file.read_bytes()) for file in Path(folder).iterdir()]
        files = dict(gather_object(own))
        if self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            history = {**asdict(self.history), "seconds": self.seconds()}
            files |= {
                checkpoints.TRAINED: tensor_bytes(self.student.trained()),
                "optimizer.pt": state_bytes(self.optimizer.state_dict()),
                "scheduler.pt": state_bytes(self.lr_scheduler.state_dict()),
                checkpoints.HISTORY: json.dumps(history, allow_nan=False).encode(),
            }
            if self.best:
                files[checkpoints.BEST] = tensor_bytes(self.best)
            self.run_folder.save_checkpoint(self.state.global_step, files)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer's hook for loading."""
        folder = Path(resume_from_checkpoint)
        self.student.load_trained(safetensors.torch.load_file(folder / checkpoints.TRAINED))
        self.history = History(**read_json(folder / checkpoints.HISTORY, TrainingError))
        if (best := folder / checkpoints.BEST).exists():
            self.best = safetensors.torch.load_file(best)

    def _copy_trained(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.student.trained().items()}


class LoopCallback(TrainerCallback):
    """Stops at a loss that isn't finite, decides when to validate and save, and reports progress."""

    def __init__(self, loop: Loop, report: Report) -> None:
        self.loop, self.report = loop, report
        self.first_step, self.batches = 0, 0
        self.shown = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step, self.loop.started = state.global_step, time.monotonic()
        self._show(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches += 1
        if time.monotonic() - self.shown >= WITHIN_SECONDS:
            self._show(state, self.batches / args.gradient_accumulation_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = self.loop.take_step_loss()
        if not math.isfinite(loss):
            step = state.global_step + 1
            raise TrainingError(f"{self.loop.label}: the loss is {loss} at step {step}: {ADVICE}")
        self.loop.history.losses.append(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        config, step = self.loop.config, state.global_step
        last, every, save = step == config.steps, config.validate_every, config.save_every
        control.should_evaluate = bool(every) and (step % every == 0 or last)
        control.should_save = bool(save) and step % save == 0 and not last
        if not control.should_evaluate:
            self._show(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show(state)

    def _show(self, state: Any, part: float = 0.0) -> None:
        self.shown = time.monotonic()
        if not state.is_world_process_zero:
            return
        config, history, step = self.loop.config, self.loop.history, state.global_step
        pace = (step + part - self.first_step) / max(self.shown - self.loop.started, 1e-9)
        self.report(
            Progress(
                self.loop.label,
                step,
                config.steps,
                history.losses[-1] if history.losses else None,
                list(history.validation.values())[-1] if history.validation else None,
                pace * config.rows_per_step,
                (config.steps - step - part) / pace if pace else math.inf,
                part,
            )
        )
