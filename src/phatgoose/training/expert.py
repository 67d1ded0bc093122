"""Train an expert on one task: PEFT's LoRA or (IA)³, or our own bottleneck adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from peft.utils.save_and_load import get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import ExpertError, StorageError, TrainingError
from phatgoose.experts.adapters.peft import to_contents
from phatgoose.experts.expert import Expert
from phatgoose.experts.names import CONFIG_FILE, slug
from phatgoose.files import read_json, write_json
from phatgoose.models.base.base import Base, as_base
from phatgoose.records import Task
from phatgoose.training.bottleneck import BottleneckStudent, adapter_locations
from phatgoose.training.config import ExpertConfig
from phatgoose.training.modules import describe_left_out, seeded_normal, target_paths
from phatgoose.training.student import Student
from phatgoose.training.trainer.job import Logger, TrainingJob
from phatgoose.training.trainer.progress import Report
from phatgoose.training.trainer.run import run_training


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
    """Trains an expert on a task's training split. The base is bit for bit the same afterwards (also on errors).

    The loss is the mean of −log p over all target tokens (end token included) of a step's rows. Under torchrun or
    accelerate launch all processes share the rows of a step; each returns the expert, the first one writes files.

    Args:
        config: the paper's settings if None.
        name: of the expert; derived from the task's name if None.
        work_folder: keeps checkpoints, from which the same call continues after a kill, and the result: the adapter's
            folder `adapter/`. A finished training is read, not repeated. None: a temporary folder, nothing is kept.
        report: called with a Progress after every step; None: a progress bar (or lines) on standard error.
        loggers: names that Trainer's report_to knows ("tensorboard", "wandb"), or TrainerCallbacks.

    Returns:
        the expert without gates; its provenance says how it was made. A LoRA or (IA)³ is in PEFT's format, a bottleneck
        adapter in AdapterHub's.

    Raises:
        TrainingError: the settings, the rows or the base can't be trained with, or a loss isn't finite; the message
            says what to do.
        BaseModelError: the base is wrapped by PEFT, or can't be scored token by token (its attention isn't causal).
        StorageError: a checkpoint or the result can't be written.
    """
    base, config = as_base(base), config or ExpertConfig()
    name = name or slug(task.name)

    def read(result: Path, record: dict[str, Any]) -> Expert:
        load = Expert.from_adapterhub if config.kind == "bottleneck" else Expert.from_peft
        expert = load(result, name=name, provenance=record)
        is_kept = work_folder is not None and result.is_relative_to(work_folder)
        return expert if is_kept else replace(expert, folder=None)

    job = TrainingJob(
        kind="expert", name=name, result="adapter", base=base, task=task, config=config,
        build=_student_builder(base, config, name), read=read,
        options={"work_folder": work_folder, "report": report, "loggers": loggers},
    )  # fmt: skip
    return run_training(job)


class PeftStudent(Student):
    """A PEFT model, whose adapter is saved in PEFT's format."""

    def save(self, folder: Path) -> None:
        model: Any = self.model
        try:
            with warnings.catch_warnings():
                # PEFT takes lora_bias' vector for a shard that wasn't gathered. (Sharded training is refused.)
                warnings.filterwarnings("ignore", "Adapter .* have invalid shape", UserWarning)
                # Embeddings aren't trained, and to find that out PEFT would ask the Hub for the base's config.
                model.save_pretrained(str(folder), save_embedding_layers=False)
        except SafetensorError as cause:  # its error for a full disk
            raise StorageError(
                f"can't write the adapter in {folder}: {cause}. Is there space left?"
            ) from cause
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
        settings = read_json(folder / CONFIG_FILE, TrainingError)
        for key in ("target_modules", "feedforward_modules"):
            if isinstance(settings.get(key), list):  # a set in PEFT, whose order changes from run to run
                settings[key] = sorted(settings[key])
        write_json(folder / CONFIG_FILE, settings)


def _student_builder(base: Base, config: ExpertConfig, name: str) -> Callable[[], Student]:
    """A function that builds the student. Refuses settings that don't fit the base."""
    if config.kind == "bottleneck":
        locations = adapter_locations(base, config)
        return lambda: BottleneckStudent(base, locations, config, name)
    paths = adapted_paths(base, config)
    if config.target_modules == "all-linear" and (rest := describe_left_out(base.model, paths)):
        warnings.warn(f"expert {name}: left out of training are {'; '.join(rest)}.", stacklevel=3)
    return lambda: PeftStudent(add_adapter(base, paths, config), base.model, config)


def adapted_paths(base: Base, config: ExpertConfig) -> list[str]:
    """The layers that a LoRA or (IA)³ with these settings adapts.

    A TrainingError if `target_modules` names no linear layer, or one that PEFT doesn't adapt in such a base.
    """
    names: str | Sequence[str] = config.target_modules
    if names == "auto":
        names = _ia3_names(base, TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
    paths = target_paths(base.model, names)
    if config.kind != "lora":
        return paths
    refused = {n for n in {path.rpartition(".")[2] for path in paths} if not _peft_adapts(base.model, n)}
    if refused and names != "all-linear":
        raise TrainingError(
            f"target_modules: in a {base.model.config.model_type} PEFT doesn't adapt linear layers called "
            f"{', '.join(sorted(refused))} (it takes the names for fused experts, or refuses them): leave them out."
        )
    return [path for path in paths if path.rpartition(".")[2] not in refused]


def _peft_adapts(model: PreTrainedModel, name: str) -> bool:
    """False if PEFT wouldn't adapt linear layers of this name. It takes some names for older fused experts."""
    settings = LoraConfig(target_modules=[name])
    try:
        _check_lora_target_modules_mamba(settings, model, name)
        convert_peft_config_for_transformers(settings, model, None)
    except ValueError:
        return False
    return name in (settings.target_modules or ())


def _ia3_names(base: Base, known: Mapping[str, list[str]]) -> list[str]:
    family = base.model.config.model_type
    if family not in known:
        raise TrainingError(
            f"kind='ia3': PEFT doesn't say which layers of a {family} an (IA)³ scales; it does for {', '.join(known)}."
        )
    return known[family]


def add_adapter(base: Base, paths: Sequence[str], config: ExpertConfig) -> PeftModel:
    """Wraps the base in a PEFT model, with new weights in float32 at `paths`."""
    conv1d = {isinstance(base.model.get_submodule(path), Conv1D) for path in paths}
    if len(conv1d) > 1:
        raise TrainingError(
            "target_modules has both nn.Linear and Conv1D layers, which one PEFT adapter can't describe."
        )
    settings = _peft_config(base, paths, config, conv1d == {True})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
            # It warns that such an adapter can't be merged, which nobody asks for here.
            warnings.filterwarnings("ignore", ".lora_bias=True. was passed but", UserWarning)
            model = get_peft_model(base.model, settings)
    except (ValueError, TypeError, NotImplementedError) as cause:
        raise TrainingError(f"PEFT can't adapt this base: {cause}") from cause
    settings.base_model_name_or_path = base.spec  # get_peft_model sets the model's own path
    _check_readable(model, settings, paths)
    initialise(model, config)
    return model


def _check_readable(model: PeftModel, settings: PeftConfig, paths: Sequence[str]) -> None:
    """Refuses, before the first step, an adapter of other layers, or one that couldn't be loaded after it is saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    kind = str(getattr(settings.peft_type, "value", settings.peft_type))
    try:
        found = to_contents({**settings.to_dict(), "peft_type": kind}, tensors, "the adapter").updates
    except ExpertError as cause:
        raise TrainingError(
            f"an adapter of these modules can't be read again once it is trained: {cause}"
        ) from cause
    if found.keys() != set(paths):
        others = sorted(found.keys() ^ set(paths))
        raise TrainingError(
            f"target_modules: PEFT would adapt other layers than were asked for, such as {others[0]}; name linear "
            "layers that it knows."
        )


def _peft_config(base: Base, paths: Sequence[str], config: ExpertConfig, is_conv1d: bool) -> PeftConfig:
    common: dict[str, Any] = {
        "fan_in_fan_out": is_conv1d,
        "task_type": "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
    }
    targets = _target_names(base.model, paths)
    if config.kind == "lora":
        return LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT computes with any number
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
            lora_bias=config.lora_bias,
            target_modules=targets,
            **common,
        )
    # (IA)³ scales the inputs of layers that PEFT calls feed-forward, and the outputs of the others.
    ends = _ia3_names(base, TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING)
    inputs = [path for path in paths if any(f".{path}".endswith(f".{end}") for end in ends)]
    feedforward = _target_names(base.model, inputs)
    if not set(feedforward) <= set(targets):  # PEFT compares the names
        targets, feedforward = sorted(paths), sorted(inputs)
    return IA3Config(target_modules=targets, feedforward_modules=feedforward, **common)


@torch.no_grad()
def initialise(model: PeftModel, config: ExpertConfig) -> None:
    """Sets LoRA's A ~ N(0, init_std²), B and its bias to zero. (IA)³'s ones and DoRA's norms of W are PEFT's own."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.copy_(seeded_normal(config.seed, name, parameter.shape) * config.init_std)
        elif ".lora_B." in name:
            parameter.zero_()


def _target_names(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """The ends of the paths ("q_proj") if these match exactly the same modules, else the whole paths."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return ends if matched == set(paths) else sorted(paths)
