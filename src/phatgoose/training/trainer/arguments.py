"""Our settings as transformers' TrainingArguments, and values shared by all processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainingArguments

from phatgoose.errors import TrainingError
from phatgoose.models.base.base import Base
from phatgoose.training.config import LoopConfig

Logger = str | TrainerCallback


def trainer_arguments(
    base: Base, config: LoopConfig, folder: Path, loggers: Sequence[Logger] = ()
) -> TrainingArguments:
    """Trainer's arguments. Building them joins the process group of torchrun or accelerate launch, if there is one.

    Raises:
        TrainingError: the rows of a step can't be shared out evenly, or the base is on another device than this
            process.
    """
    device = base.device.type
    built = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.rows_per_batch,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=config.max_grad_norm or 0.0,
        optim="adamw_torch_fused" if device in ("cpu", "cuda") else "adamw_torch",
        seed=config.seed,
        use_cpu=device == "cpu",
        train_sampling_strategy="sequential",  # OrderedRows decides the order
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device == "cuda",
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
    _check_device(base, built)
    built._n_gpu = min(built._n_gpu, 1)  # several devices need several processes; DataParallel is never used
    built.gradient_accumulation_steps = _batches_per_step(config, built.world_size)
    return built


def _check_device(base: Base, args: TrainingArguments) -> None:
    device, own = base.device, args.device
    if own.type != device.type or (device.index or 0) != (own.index or 0):
        raise TrainingError(
            f"the base is on {device}, this process trains on {own}: load the base there "
            f"(load_base(..., device={str(own)!r})), or set CUDA_VISIBLE_DEVICES."
        )


def _batches_per_step(config: LoopConfig, processes: int) -> int:
    """How many batches each process computes for one step."""
    share, rest = divmod(config.rows_per_step, config.rows_per_batch * processes)
    if rest:
        raise TrainingError(
            f"rows_per_step = {config.rows_per_step} is not a multiple of rows_per_batch x processes = "
            f"{config.rows_per_batch} x {processes}: change one of them."
        )
    return share


def broadcast_value(value: Any) -> Any:
    """The first process's value, in all processes."""
    box = [value]
    broadcast_object_list(box)
    return box[0]
