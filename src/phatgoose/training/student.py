"""The model that the training loop sees: a batch in, the summed loss of its targets out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from phatgoose.errors import TrainingError
from phatgoose.models.base.base import device_of
from phatgoose.models.text.batch import target_logits, target_loss
from phatgoose.training.config import LoopConfig

SHORT_TOKENS = 128
"""Tokens up to which plain attention beats torch's fused kernel in bf16 on a CPU, forward and backward: 13 against 26
ms at 48 tokens, 57 against 69 ms at 128, 96 against 67 ms at 256 (16 rows, 9 heads of 64)."""


class Student(nn.Module):
    """Wraps the trained model, so that Trainer, accelerate and DDP see one plain module and nothing of PEFT.

    A subclass for each kind of adapter says how it is saved.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel, config: LoopConfig) -> None:
        """`model` computes (a PEFT model, or the base itself); `base` is the transformers model inside it."""
        super().__init__()
        self.model = model
        self.base_dropout = config.base_dropout
        self.autocast = autocast_dtype(base, config)
        self.device_type = device_of(base).type
        self.checkpointing = config.gradient_checkpointing
        # Through __dict__, so that it isn't registered as a second submodule.
        self.__dict__["base"] = base
        if (device_map := getattr(base, "hf_device_map", None)) is not None:
            self.hf_device_map = device_map  # with it, Trainer and accelerate don't move the model
        if self.checkpointing:
            if not base.supports_gradient_checkpointing:
                raise TrainingError(
                    f"{type(base).__name__} can't recompute activations: set gradient_checkpointing=False."
                )
            new = getattr(base, "activation_checkpointing_enable", None)  # the name since transformers 5.20
            (new or base.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(self, **batch: Tensor) -> Tensor:
        """Sum over all targets of −log p(target), a float32 scalar. `batch` is made by `collate`."""
        labels = batch["labels"]
        with self._attention(batch["input_ids"].shape[1]), self._precision():
            logits = target_logits(self.model, batch)
        return target_loss(logits, labels)

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        if mode and not self.base_dropout:
            self.__dict__["base"].eval()
            for name, module in self.named_modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True  # recomputes only in training mode; dropout is in its children
                elif ".lora_dropout." in name:
                    module.training = True
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors into the trained parameters of the same names."""
        parameters = self.trained()
        if parameters.keys() != tensors.keys():
            raise TrainingError(
                "the checkpoint holds other tensors than this training has: delete its folder to start afresh."
            )
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def save(self, folder: Path) -> None:
        """Writes what was trained into an empty folder."""
        raise NotImplementedError

    def _precision(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast)

    def _attention(self, tokens: int) -> Any:
        # Not with checkpointing: recomputation runs outside of this context, where another kernel would be chosen.
        if self.device_type == "cpu" and self.autocast and tokens <= SHORT_TOKENS and not self.checkpointing:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()


def autocast_dtype(base: PreTrainedModel, config: LoopConfig) -> torch.dtype | None:
    """bfloat16 if the training computes in it, None for float32.

    With a bf16 base and float32 adapters, autocast computes the adapters in bf16 too. That is nearly as fast as
    adapters held in bf16 (1.9 against 1.7 s of CPU time for a step of SmolLM2-135M; 5.4 s in float32), without their
    rounding.

    A TrainingError if the base's dtype doesn't allow the precision asked for.
    """
    dtype = base.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise TrainingError(
            f"the base is in {dtype}, in which gradients over- or underflow: load it with dtype='bfloat16' or "
            "'float32'."
        )
    if config.precision == "float32" and dtype != torch.float32:
        raise TrainingError(
            f"precision='float32' needs the base in float32, it is in {dtype}: load it with dtype='float32', or set "
            "precision='auto'."
        )
    if config.precision == "bfloat16" or dtype == torch.bfloat16:
        return torch.bfloat16
    return None
