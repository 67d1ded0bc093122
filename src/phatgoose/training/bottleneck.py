"""Bottleneck adapters, which PEFT lacks: trained by hooks, saved in AdapterHub's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from phatgoose.errors import TrainingError
from phatgoose.experts.adapters import adapterhub
from phatgoose.experts.names import ADAPTERHUB_WEIGHTS, CONFIG_FILE
from phatgoose.files import write_json
from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.base.base import Base
from phatgoose.models.base.layers import linear_shape, track_residual
from phatgoose.ops.bottleneck import Bottleneck, Residual
from phatgoose.ops.update import Update, no_rows
from phatgoose.training.config import ExpertConfig
from phatgoose.training.gate import decode_path, encode_path
from phatgoose.training.modules import seeded_normal
from phatgoose.training.student import Student
from phatgoose.training.trainer.checkpoints import tensor_bytes

SETTINGS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"mh_adapter": False, "original_ln_before": True, "is_parallel": False, "scaling": 1.0},
    "houlsby": {"mh_adapter": True, "original_ln_before": False, "is_parallel": False, "scaling": 1.0},
    "parallel": {"mh_adapter": False, "original_ln_before": False, "is_parallel": True, "scaling": 4.0},
}
"""Our placements in AdapterHub's settings: its SeqBnConfig, DoubleSeqBnConfig and ParBnConfig."""


def settings_of(config: ExpertConfig) -> dict[str, Any]:
    """AdapterHub's settings for such an adapter."""
    return {
        **SETTINGS[config.placement],
        "output_adapter": True,
        "cross_adapter": False,
        "reduction_factor": config.reduction,
        "non_linearity": config.activation,
        "original_ln_after": True,
        "residual_before_ln": True,
        "init_weights": "mam_adapter",  # the library's name for an up-projection that starts as zero
        "dropout": config.dropout,
    }


def adapter_locations(base: Base, config: ExpertConfig) -> dict[str, str]:
    """Path of each layer that gets an adapter → path of the module whose input is its residual stream.

    A TrainingError if it isn't known where adapters go in this base.
    """
    family = base.model.config.model_type
    if family not in adapterhub.FAMILIES:
        raise TrainingError(
            f"kind='bottleneck': where adapters go in a {family} isn't known, only in "
            f"{', '.join(adapterhub.FAMILIES)}."
        )
    paths = [path for path, _ in base.model.named_modules()]
    return adapterhub.places(family, settings_of(config), paths)


class Adapter(nn.Module):
    """scale · (U f(D x + d) + u₀) of one module, in float32; starts as zero."""

    def __init__(
        self, size: int, config: ExpertConfig, path: str, device: torch.device, source: str | None
    ) -> None:
        """`source`: path of the module whose input is the residual stream; None if the adapter doesn't read it."""
        super().__init__()
        self.source = source
        r = max(1, size // config.reduction)
        self.down = nn.Linear(size, r, device=device, dtype=torch.float32)
        self.up = nn.Linear(r, size, device=device, dtype=torch.float32)
        self.dropout = nn.Dropout(config.dropout)
        settings = SETTINGS[config.placement]
        self.scale, self.activation = float(settings["scaling"]), adapterhub.ACTIVATIONS[config.activation]
        self.reads_output = not settings["is_parallel"]
        with torch.no_grad():
            self.down.weight.copy_(seeded_normal(config.seed, path, self.down.weight.shape) * config.init_std)
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, y: Tensor, residual: Residual | None) -> Tensor:
        """The value to add to y: [..., d] → [..., d] in y's dtype."""
        return self.dropout(self._bottleneck.apply(y, residual)).to(y.dtype)

    def update(self) -> Update:
        """The adapter as an `Update`, on the CPU."""
        bottleneck = self._bottleneck.detached(torch.float32).to("cpu")
        return Update(*no_rows(None, self.up.out_features), bottleneck=bottleneck)

    @property
    def _bottleneck(self) -> Bottleneck:
        return Bottleneck(
            self.down.weight, self.up.weight, self.down.bias, self.up.bias, self.activation, self.scale,
            residual=self.source, reads_output=self.reads_output,
        )  # fmt: skip


class BottleneckStudent(Student):
    """The base with adapters whose outputs are added to those of their layers by hooks. Only the adapters are trained.

    locations: the result of `adapter_locations`.
    """

    def __init__(self, base: Base, locations: Mapping[str, str], config: ExpertConfig, name: str) -> None:
        model = base.model
        model.requires_grad_(False)
        super().__init__(model, model, config)
        self.adapters = nn.ModuleDict()
        settings = settings_of(config)
        reads_residual = settings["is_parallel"] or settings["original_ln_before"]
        hooks, size = Hooks(), 0  # hooks are removed by `preserved`
        for path, location in locations.items():
            source = location if reads_residual else None
            module = model.get_submodule(path)
            _, size = linear_shape(module) or (0, 0)
            adapter = Adapter(size, config, path, next(module.parameters()).device, source)
            self.adapters[encode_path(path)] = adapter
            residual = Residual() if source is not None else None
            hooks.add([module.register_forward_hook(_adding(adapter, residual))])
            if source is not None and residual is not None:
                hooks.add(track_residual(model.get_submodule(source), module, residual))
        self.record: dict[str, Any] = {
            "config": settings,
            "hidden_size": size,
            "model_class": type(model).__name__,
            "model_name": base.spec,
            "model_type": model.config.model_type,
            "name": _library_name(name),
            "version": "phatgoose",
        }

    def save(self, folder: Path) -> None:
        """Writes the adapters in AdapterHub's format."""
        found = {decode_path(key): cast(Adapter, adapter).update() for key, adapter in self.adapters.items()}
        tensors = adapterhub.to_tensors(found, self.record["model_type"], self.record["name"])
        (folder / ADAPTERHUB_WEIGHTS).write_bytes(tensor_bytes(tensors))
        write_json(folder / CONFIG_FILE, self.record)


def _adding(adapter: Adapter, residual: Residual | None) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + adapter(output, residual)

    return hook


def _library_name(name: str) -> str:
    """The adapter's name in AdapterHub's library, a key of a ModuleDict: without dots, and not one of its methods."""
    key = name.replace(".", "-")
    return f"{key}-adapter" if hasattr(nn.ModuleDict(), key) else key
