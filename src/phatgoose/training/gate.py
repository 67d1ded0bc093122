"""Train a gate: one vector per adapted module learns when the frozen expert should act."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError, TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import read_tensor_file
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256_json
from phatgoose.fingerprints import check_same_base
from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.attach.modules import (
    check_copies,
    check_parameters,
    expert_on_model,
    module_at,
    shape_of,
)
from phatgoose.models.base.base import Base, as_base, device_of
from phatgoose.models.base.layers import ModuleLayer, residual_source, resolve_update, track_residual
from phatgoose.models.moe.names import modules_by_path
from phatgoose.ops import Layer, Stack, backend, make_stack
from phatgoose.ops.update import Update
from phatgoose.records import Task
from phatgoose.training.config import GateConfig
from phatgoose.training.student import Student
from phatgoose.training.trainer.checkpoints import tensor_bytes
from phatgoose.training.trainer.job import Logger, TrainingJob
from phatgoose.training.trainer.progress import Report
from phatgoose.training.trainer.run import run_training

FILE = "gates.safetensors"


def train_gate(
    base: Base | PreTrainedModel,
    expert: Expert,
    task: Task,
    config: GateConfig | None = None,
    *,
    work_folder: str | Path | None = None,
    report: Report | None = None,
    loggers: Sequence[Logger] = (),
) -> Expert:
    """Trains one vector v per module of the expert, whose output is W u + σ(vᵀu)·Δ(u) (PHATGOOSE, section 3).

    Only the vectors are trained: base and expert are bit for bit the same afterwards. The arguments are those of
    `train_expert`; both may use the same `work_folder`.

    Returns:
        a new expert with gates; the given one is unchanged. provenance["gate"] says how the gates were made, and
        their cost as a share of the expert's ("cost_share": seconds and tokens), if the expert's record has that.

    Raises:
        TrainingError: as for `train_expert`; or the expert doesn't fit the base's modules, or no gate moved.
        BaseModelError: the expert was trained on another base.
        StorageError: a checkpoint or the result can't be written.
    """
    base, config = as_base(base), config or GateConfig()
    here, own = match_to_base(base, expert)
    check_copies(dict(base.model.named_modules(remove_duplicate=False)), [here])

    def read(result: Path, record: dict[str, Any]) -> Expert:
        tensors = read_tensor_file(result / FILE, empty=True).tensors
        gates = {own.get(path, path): gate for path, gate in tensors.items()}
        record = {**record, "cost_share": _cost_share(record, expert.provenance)}
        return expert.with_gates(gates, provenance=record)

    job = TrainingJob(
        kind="gate", name=expert.name, result="gates", base=base, task=task, config=config,
        build=lambda: GatedStudent(base.model, here.updates, config), read=read,
        options={"work_folder": work_folder, "report": report, "loggers": loggers},
        extra_key={"expert": _expert_hash(expert)},
    )  # fmt: skip
    return run_training(job)


class Score(torch.autograd.Function):
    """vᵀu in float32, from u of any dtype. Saves u itself for the backward pass, instead of a float32 copy."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        """u: [..., d], v: [1, d] float32 → [..., 1] float32."""
        ctx.save_for_backward(u, v)
        with torch.autocast(u.device.type, enabled=False):
            return u.float() @ v.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, v = ctx.saved_tensors
        (grad,) = grads
        with torch.autocast(u.device.type, enabled=False):
            to_u = (grad * v).to(u.dtype) if ctx.needs_input_grad[0] else None
            return to_u, grad.reshape(1, -1) @ u.reshape(-1, u.shape[-1]).float()


class Gate(nn.Linear):
    """The vector v of one module. It is an nn.Linear, so that wrappers that shard or hook leaf modules find it."""

    def __init__(self, d_in: int, device: torch.device) -> None:
        super().__init__(d_in, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)

    def forward(self, u: Tensor) -> Tensor:
        """σ(vᵀu): [..., d_in] any dtype → [..., 1] float32."""
        return torch.sigmoid(Score.apply(u, self.weight))


class GatedStudent(Student):
    """The base with σ(vᵀu)·Δ(u) added to every adapted module's output by hooks. Only the gates are trained."""

    def __init__(self, base: PreTrainedModel, updates: Mapping[str, Update], config: GateConfig) -> None:
        base.requires_grad_(False)
        super().__init__(base, base, config)
        self.gates = nn.ModuleDict()
        modules = modules_by_path(base, updates)
        dtype, hooks = self.autocast or torch.float32, Hooks()  # removed by `preserved`
        for path, update in updates.items():
            module = modules[path]
            d_in, d_out = shape_of(module, update.embedding)
            gate = Gate(d_out if update.embedding else d_in, device_of(base))
            self.gates[encode_path(path)] = gate
            stack = make_stack([resolve_update(update, module, path)], d_in, d_out, dtype).to(device_of(base))
            low = update.is_low_rank
            hook = _low_rank_hook(gate, stack) if low else _mix_hook(gate, stack, ModuleLayer(module))
            hooks.add([module.register_forward_hook(hook)])
            source = residual_source(base, [update])
            if source is not None and stack.residual is not None:
                hooks.add(track_residual(source, module, stack.residual))

    def save(self, folder: Path) -> None:
        """Writes v [d_in] float32 by module path."""
        gates = {decode_path(key): cast(Gate, gate) for key, gate in self.gates.items()}
        if not any(bool(gate.weight.any()) for gate in gates.values()):
            raise TrainingError(
                "no gate moved from zero: the expert does nothing (is its B all zero?), or the learning rate is zero "
                "throughout."
            )
        vectors = {path: gate.weight.reshape(-1) for path, gate in gates.items()}
        (folder / FILE).write_bytes(tensor_bytes(vectors))


def _low_rank_hook(gate: Gate, stack: Stack) -> Any:
    """A hook that adds σ(vᵀu)·Δ(u) of a low-rank update."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        u = args[0]
        # The gate is one number per token, so it may scale the r values between A and B instead of the d_out after B.
        dtype = torch.promote_types(u.dtype, stack.A.dtype)
        low = u.to(dtype) @ stack.A.to(dtype).T
        low = (low.float() * (gate(u) * stack.scales[0])).to(dtype)
        return output + (low @ stack.B.to(dtype)).to(output.dtype)

    return hook


def _mix_hook(gate: Gate, stack: Stack, layer: Layer) -> Any:
    """The same for any update, by the routing operation: one expert, whose weight is the gate."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        u, y = args[0], output.reshape(-1, output.shape[-1])
        flat = u.reshape(-1) if stack.embedding else u.reshape(-1, u.shape[-1])
        weights = gate(y if stack.embedding else flat)  # [N, 1]
        chosen = torch.zeros(weights.shape, dtype=torch.int64, device=y.device)
        return backend("torch").mix(flat, y, stack, chosen, weights, layer).reshape(output.shape)

    return hook


def encode_path(path: str) -> str:
    """A module path as a key of a ModuleDict, which allows no dots."""
    return path.replace("%", "%25").replace(".", "%2E")


def decode_path(key: str) -> str:
    return key.replace("%2E", ".").replace("%25", "%")


def match_to_base(base: Base, expert: Expert) -> tuple[Expert, dict[str, str]]:
    """(the expert with this base's names of modules, name here → the expert's own name where they differ).

    A BaseModelError if the expert was made on another base. A TrainingError names a module that doesn't fit.
    """
    if expert.base is not None:
        check_same_base(expert.base, base.fingerprint, f"expert {expert.name!r}")
    modules = modules_by_path(base.model, expert.updates)
    try:
        here, names = expert_on_model(base.model, modules, expert)
        check_parameters(modules, [here])
    except RoutingError as cause:
        raise TrainingError(str(cause)) from cause
    alone = Pool([here])
    try:
        for path in here.updates:
            module_at(modules, path, alone)
    except RoutingError as cause:
        raise TrainingError(f"this isn't the expert's base: {cause}") from cause
    return here, {name: path for path, name in names.items()}


def _expert_hash(expert: Expert) -> str:
    tensors = {
        k: hashlib.sha256(safetensors.torch.save({"": t.contiguous()})).hexdigest()
        for k, t in expert.tensors.items()
    }
    return sha256_json([dict(expert.adapter_config), tensors])


def _cost_share(gate: Mapping[str, Any], expert: Mapping[str, Any]) -> dict[str, float]:
    """The gate's cost divided by its expert's, where both are known."""
    known = [k for k in ("seconds", "tokens") if gate.get(k) and expert.get(k)]
    return {key: round(gate[key] / expert[key], 4) for key in known}
