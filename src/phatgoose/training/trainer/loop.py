"""transformers' Trainer as both trainings use it: exact token means, our checkpoints, nothing on the terminal."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from phatgoose.errors import TrainingError
from phatgoose.files import read_json
from phatgoose.models.base.base import Base
from phatgoose.models.text.batch import length_batches, make_batch
from phatgoose.training.config import LoopConfig
from phatgoose.training.student import Student
from phatgoose.training.trainer.arguments import Logger, broadcast_value
from phatgoose.training.trainer.checkpoints import (
    BEST,
    HISTORY,
    TRAINED,
    History,
    RunFolder,
    state_bytes,
    tensor_bytes,
)
from phatgoose.training.trainer.progress import Report
from phatgoose.training.trainer.rows import TrainingRows
from phatgoose.training.trainer.watch import ADVICE, LoopCallback


class Loop(Trainer):
    """One training. `best` and `history` are its outcome."""

    def __init__(
        self,
        student: Student,
        base: Base,
        rows: TrainingRows,
        config: LoopConfig,
        args: TrainingArguments,
        keep: RunFolder | None,
        *,
        label: str,
        report: Report,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.collated = lambda encoded: make_batch(base, encoded)
        watch = LoopCallback(self, config, label, report)
        try:
            super().__init__(
                model=student,
                args=args,
                data_collator=self.collated,
                train_dataset=rows.train,
                callbacks=[watch, *(c for c in loggers if isinstance(c, TrainerCallback))],
            )
        except (ValueError, RuntimeError, ImportError) as cause:
            raise TrainingError(f"the training can't be set up: {cause}") from cause
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        if (
            self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or self.accelerator.mixed_precision not in (None, "no")
        ):
            raise TrainingError(
                "FSDP, DeepSpeed and accelerate's mixed precision are not supported: launch with torchrun or plain "
                "`accelerate launch --multi_gpu --mixed_precision no` (precision is a setting of the config)."
            )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the targets of the whole step
        self.config, self.rows, self.keep = config, rows, keep
        self.history, self.best = History(), dict[str, Tensor]()
        self.step_loss = torch.zeros((), device=args.device)
        self.started = time.monotonic()

    def run(self) -> None:
        """Trains to the end, from the last whole checkpoint if there is one.

        Raises:
            TrainingError: a loss is NaN or infinite (with its step).
            StorageError: a checkpoint can't be written.
        """
        checkpoint = broadcast_value(str(self.keep.last_checkpoint() or "") if self.keep else "")
        self.train(resume_from_checkpoint=checkpoint or None)
        self.history.seconds = self.seconds()
        if not self.config.validate_every:
            self.best = _copies(self.student.trained())

    @property
    def student(self) -> Student:
        return self.model  # type: ignore[return-value]  # never wrapped: DDP's wrapper is model_wrapped

    def seconds(self) -> float:
        return self.history.seconds + time.monotonic() - self.started

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's share of the mean over all targets of the step, in all its batches and processes."""
        # DDP averages gradients over processes; their shares are to be summed.
        loss = model(**inputs) / num_items_in_batch * self.accelerator.num_processes
        self.step_loss += loss.detach()
        return loss

    def take_step_loss(self) -> float:
        """The loss of the step whose batches are all done, the same in all processes."""
        loss = float(self.accelerator.reduce(self.step_loss.clone(), reduction="mean"))
        self.step_loss.zero_()
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all target tokens of the validation rows; keeps a copy of what is trained if it is the lowest."""
        step = self.state.global_step
        loss = self._validation_loss()
        if not math.isfinite(loss):
            raise TrainingError(f"the validation loss is {loss} at step {step}: {ADVICE}")
        if (
            self.history.best_step is None
            or loss < self.history.validation[str(self.history.best_step)]
            or not self.best
        ):
            self.history.best_step, self.best = step, _copies(self.student.trained())
        self.history.validation[str(step)] = loss
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
            batch = self.collated([rows[i] for i in indices])
            total += float(self.student(**{k: t.to(self.args.device) for k, t in batch.items()}))
        if self.args.world_size > 1:
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.args.device)))
        return total / sum(len(row.target_ids) for row in rows)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.keep is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = [(file.name, file.read_bytes()) for file in Path(folder).iterdir()]
        random_states = dict(gather_object(own))
        if self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            history = History(**{**self.history.to_json(), "seconds": self.seconds()})
            with tempfile.TemporaryDirectory() as folder:
                self.state.save_to_json(os.path.join(folder, "trainer_state.json"))
                trainer_state = Path(folder, "trainer_state.json").read_bytes()
            files = {
                TRAINED: tensor_bytes(self.student.trained()),
                "optimizer.pt": state_bytes(self.optimizer.state_dict()),
                "scheduler.pt": state_bytes(self.lr_scheduler.state_dict()),
                "trainer_state.json": trainer_state,
                HISTORY: _json_bytes(history.to_json()),
                **random_states,
            }
            if self.best:
                files[BEST] = tensor_bytes(self.best)
            self.keep.save_checkpoint(self.state.global_step, files)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        copy_into_trained(self.student, safetensors.torch.load_file(folder / TRAINED))
        self.history = History(**read_json(folder / HISTORY, TrainingError))
        if (folder / BEST).exists():
            self.best = safetensors.torch.load_file(folder / BEST)


@torch.no_grad()
def copy_into_trained(student: Student, tensors: dict[str, Tensor]) -> None:
    """Copies tensors into what is trained."""
    parameters = student.trained()
    if parameters.keys() != tensors.keys():
        raise TrainingError(
            "the checkpoint holds other tensors than this training has: delete its folder to start afresh."
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _copies(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def _json_bytes(data: Any) -> bytes:
    return json.dumps(data, allow_nan=False).encode()
