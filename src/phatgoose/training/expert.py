"""Training an expert: a LoRA adapter on one task, by PEFT and transformers' Trainer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from phatgoose.errors import StorageError, TrainingError
from phatgoose.experts.expert import Expert, slug
from phatgoose.experts.peft import CONFIG_FILE
from phatgoose.files import read_json, write_json
from phatgoose.models.base import Base, as_base
from phatgoose.records import Task
from phatgoose.training.arguments import Logger
from phatgoose.training.config import ExpertConfig
from phatgoose.training.modules import is_conv1d, target_paths
from phatgoose.training.progress import Report
from phatgoose.training.run import Job, run
from phatgoose.training.student import Student

__all__ = ["ExpertConfig", "train_expert"]


def train_expert(
    base: Base | PreTrainedModel,
    task: Task,
    config: ExpertConfig | None = None,
    *,
    name: str | None = None,
    work_folder: str | Path | None = None,
    report: Report | None = None,
    loggers: Sequence[Logger] = (),
) -> Expert:
    """Trains an expert on a task's training split. The base is the same object, bit for bit, afterwards (also on errors).

    The loss is the mean of −log p over all target tokens (end token included) of a step's rows. Started by torchrun or
    accelerate launch, the rows of a step are shared by all processes; each returns the expert, the first one writes.

    Args:
        config: the paper's settings if None.
        name: of the expert; from the task's name if None.
        work_folder: keeps checkpoints, from which the same call continues after a kill, and the result: a PEFT folder
            `adapter/`. A finished one is read, not trained again. None: a temporary folder, nothing is kept.
        report: called with a Progress after every step; None: a progress bar (or lines) on standard error.
        loggers: names that Trainer's report_to knows ("tensorboard", "wandb"), or TrainerCallbacks.

    Returns:
        the expert without gates; its provenance says how it was made.

    Raises:
        TrainingError: settings, rows or the base can't be trained with, or a loss isn't finite; the message says what to do.
        BaseModelError: the base is wrapped by PEFT.
        StorageError: a checkpoint or the result can't be written.
    """
    base, config = as_base(base), config or ExpertConfig()
    paths = target_paths(base.model, config.target_modules)
    folder = Path(work_folder) if work_folder is not None else None

    def read(result: Path, record: dict[str, Any]) -> Expert:
        expert = Expert.from_peft(result, name=name or slug(task.name), provenance=record)
        return (
            expert if folder is not None and result.is_relative_to(folder) else replace(expert, folder=None)
        )

    job = Job(
        kind="expert",
        result="adapter",
        base=base,
        task=task,
        config=config,
        key={},
        build=lambda: Student(adapted(base, paths, config), base.model, config),
        write=_write,
        read=read,
    )
    return run(job, folder, f"expert {name or slug(task.name)}", report, loggers)


def adapted(base: Base, paths: Sequence[str], config: ExpertConfig) -> PeftModel:
    """PEFT's model around the base, with new LoRA weights in float32 at `paths`."""
    conv1d = {is_conv1d(base.model.get_submodule(path)) for path in paths}
    if len(conv1d) > 1:
        raise TrainingError(
            "target_modules has both nn.Linear and Conv1D layers, which one PEFT adapter can't describe."
        )
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=_shortest(base.model, paths),
        fan_in_fan_out=conv1d == {True},
        task_type="SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
            model = get_peft_model(base.model, lora)
    except (ValueError, TypeError, NotImplementedError) as cause:
        raise TrainingError(f"PEFT can't adapt this base: {cause}") from cause
    lora.base_model_name_or_path = base.spec  # get_peft_model puts the model's own path there
    initialise(model, config)
    return model


@torch.no_grad()
def initialise(model: PeftModel, config: ExpertConfig) -> None:
    """A ~ N(0, init_std²), B = 0, from the seed and the tensor's own name: whatever else is adapted, on any device."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{config.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(values * config.init_std)
        elif ".lora_B." in name:
            parameter.zero_()


def _shortest(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """The ends of the paths ("q_proj") where these mean exactly the same modules, else the paths."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return ends if meant == set(paths) else sorted(paths)


def _write(student: Student, folder: Path) -> None:
    model = student.model
    assert isinstance(model, PeftModel)
    # The embeddings aren't trained; PEFT would look up the base's config on the Hub to find that out.
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    except SafetensorError as cause:  # how it reports a full disk
        raise StorageError(f"can't write the adapter in {folder}: {cause}. Is there space left?") from cause
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form to fill in
    settings = read_json(folder / CONFIG_FILE, TrainingError)
    settings["target_modules"] = sorted(
        settings["target_modules"]
    )  # a set in PEFT: its order changes from run to run
    write_json(folder / CONFIG_FILE, settings)
