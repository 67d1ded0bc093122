"""What one training consists of, as an object and as transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainingArguments

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.records import Task
from phatgoose.training.config import LoopConfig
from phatgoose.training.student import Student
from phatgoose.training.trainer.progress import Report

Logger = str | TrainerCallback


class RunOptions(TypedDict, total=False):
    """How a training runs, whatever it trains; explained at `train_expert`."""

    work_folder: str | Path | None
    report: Report | None
    loggers: Sequence[Logger]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What to train, how to build and read it, and how it runs. `run_training` does the rest."""

    kind: str
    """"expert" or "gate"."""
    name: str
    """The expert's."""
    result: str
    """Name of the result's folder in the work folder."""
    base: Base
    task: Task
    config: LoopConfig
    build: Callable[[], Student]
    """Makes the model, inside `preserved`."""
    read: Callable[[Path, dict[str, Any]], Expert]
    """Reads the files that the trained model has saved, with the record."""
    options: RunOptions
    extra_key: dict[str, Any] = field(default_factory=dict)
    """What the result depends on beside config, task and base."""

    @property
    def label(self) -> str:
        """What progress shows, e.g. "expert plural"."""
        return f"{self.kind} {self.name}"

    def key(self) -> dict[str, Any]:
        """Everything that the result depends on: a work folder with another key is refused."""
        return {
            "config": self.config.key(),
            "task": self.task.hash,
            "base": self.base.facts(),
            **chat_template_key(self.base, self.task),
            **self.extra_key,
        }

    def trainer_arguments(self, folder: Path) -> TrainingArguments:
        """Trainer's arguments. Building them joins the process group of torchrun or accelerate launch, if there is one.

        A TrainingError if the rows of a step can't be shared out evenly, or the base is on another device.
        """
        config, device, loggers = self.config, self.base.device, self.options.get("loggers", ())
        built = TrainingArguments(
            output_dir=str(folder),
            max_steps=config.steps,
            per_device_train_batch_size=config.rows_per_batch,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            lr_scheduler_type="constant_with_warmup",
            max_grad_norm=config.max_grad_norm or 0.0,
            optim="adamw_torch_fused" if device.type in ("cpu", "cuda") else "adamw_torch",
            seed=config.seed,
            use_cpu=device.type == "cpu",
            train_sampling_strategy="sequential",  # TrainingRows decides the order
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=device.type == "cuda",
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            eval_strategy="no",
            save_strategy="no",  # LoopCallback decides when
            logging_strategy="steps" if loggers else "no",
            logging_steps=10,
            logging_nan_inf_filter=False,
            report_to=[name for name in loggers if isinstance(name, str)],
            disable_tqdm=True,
        )
        own = built.device
        if own.type != device.type or (device.index or 0) != (own.index or 0):
            raise TrainingError(
                f"the base is on {device}, this process trains on {own}: load the base there "
                f"(load_base(..., device={str(own)!r})), or set CUDA_VISIBLE_DEVICES."
            )
        # Several devices need several processes; DataParallel is never used.
        built._n_gpu = min(built._n_gpu, 1)
        batches, rest = divmod(config.rows_per_step, config.rows_per_batch * built.world_size)
        if rest:
            raise TrainingError(
                f"rows_per_step = {config.rows_per_step} is not a multiple of rows_per_batch x processes = "
                f"{config.rows_per_batch} x {built.world_size}: change one of them."
            )
        built.gradient_accumulation_steps = batches
        return built


def broadcast_value(value: Any) -> Any:
    """The first process's value, in all processes."""
    box = [value]
    broadcast_object_list(box)
    return box[0]
