"""Training a gate: base and expert frozen, one vector per adapted module learns when the expert should act."""

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
from phatgoose.experts.adapters.peft import read_tensors
from phatgoose.experts.expert import Expert
from phatgoose.files import sha256_json
from phatgoose.fingerprints import check_same_base
from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.attach.modules import check_copies, check_parameters
from phatgoose.models.attach.placement import placed
from phatgoose.models.base.base import Base, as_base, device_of
from phatgoose.models.base.layers import (
    ModuleLayer,
    embedding_shape,
    linear_shape,
    residual_source,
    resolve_update,
    track_residual,
)
from phatgoose.models.moe.names import modules_by_path
from phatgoose.ops import Layer, Stack, backend, make_stack
from phatgoose.ops.update import Update, sizes_agree
from phatgoose.records import Task
from phatgoose.training.config import GateConfig
from phatgoose.training.student import Student
from phatgoose.training.trainer.arguments import Logger
from phatgoose.training.trainer.checkpoints import tensor_bytes
from phatgoose.training.trainer.progress import Report
from phatgoose.training.trainer.run import TrainingJob, run_training

__all__ = ["GateConfig", "train_gate"]
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
    """Trains one vector v per module of the expert, with W u + σ(vᵀu)·Δ(u) in the module's place (PHATGOOSE, section 3).

    Everything but the vectors is frozen: base and expert are bit for bit the same afterwards. Arguments as those of
    `train_expert`; the same `work_folder` may be used for both.

    Returns:
        a new expert with gates; the one passed is untouched. provenance["gate"] says how they were made, and what they
        cost as a share of the expert ("cost_share": seconds and tokens), where the expert's record has that.

    Raises:
        TrainingError: as `train_expert`; also an expert that doesn't fit the base's modules, or gates that never moved.
        BaseModelError: the expert was trained on another base.
        StorageError: a checkpoint or the result can't be written.
    """
    base, config = as_base(base), config or GateConfig()
    here, names = match_to_base(base, expert)
    own = {name: path for path, name in names.items()}
    check_copies(dict(base.model.named_modules(remove_duplicate=False)), [here])
    folder = Path(work_folder) if work_folder is not None else None

    def read(result: Path, record: dict[str, Any]) -> Expert:
        gates = {own.get(path, path): gate for path, gate in read_tensors(result / FILE).items()}
        record = {**record, "cost_share": _cost_share(record, expert.provenance)}
        return expert.with_gates(gates, provenance=record)

    job = TrainingJob(
        kind="gate",
        result="gates",
        base=base,
        task=task,
        config=config,
        key={"expert": _digest(expert)},
        build=lambda: GatedStudent(base.model, here.updates, config),
        write=_write,
        read=read,
    )
    return run_training(job, folder, f"gate {expert.name}", report, loggers)


class Score(torch.autograd.Function):
    """vᵀu in float32 from u of any dtype, keeping u itself for the backward pass instead of a float32 copy."""

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
    """One module's v. A module of its own, so that wrappers which shard or hook leaf modules find it."""

    def __init__(self, d_in: int, device: torch.device) -> None:
        super().__init__(d_in, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)

    def forward(self, u: Tensor) -> Tensor:
        """σ(vᵀu): [..., d_in] any dtype → [..., 1] float32."""
        return torch.sigmoid(Score.apply(u, self.weight))


class GatedStudent(Student):
    """The base with σ(vᵀu)·Δ(u) added to the output of every module of the expert, by hooks; only the gates are trained."""

    def __init__(self, base: PreTrainedModel, updates: Mapping[str, Update], config: GateConfig) -> None:
        base.requires_grad_(False)
        super().__init__(base, base, config)
        self.gates = nn.ModuleDict()
        modules = modules_by_path(base, updates)
        dtype, hooks = self.autocast or torch.float32, Hooks()  # taken off by `preserved`
        for path, update in updates.items():
            module = modules[path]
            d_in, d_out = _size(module, update) or (0, 0)  # check_fits has refused others
            gate = Gate(d_out if update.embedding else d_in, device_of(base))
            self.gates[encode_path(path)] = gate
            stack = make_stack([resolve_update(update, module, path)], d_in, d_out, dtype).to(device_of(base))
            adding = (
                _adding_rows(gate, stack) if update.is_low_rank else _adding(gate, stack, ModuleLayer(module))
            )
            hooks.add([module.register_forward_hook(adding)])
            source = residual_source(base, [update])
            if source is not None and stack.residual is not None:
                hooks.add(track_residual(source, module, stack.residual))

    def vectors(self) -> dict[str, Tensor]:
        """v by module path: [d_in] float32, on the CPU."""
        return {
            decode_path(key): cast(Gate, gate).weight.detach().reshape(-1).to("cpu", torch.float32, copy=True)
            for key, gate in self.gates.items()
        }


def _adding_rows(gate: Gate, stack: Stack) -> Any:
    """The hook for a low-rank update."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        u = args[0]
        # A number per token: it can scale the r values between A and B instead of the d_out after.
        dtype = torch.promote_types(u.dtype, stack.A.dtype)
        low = u.to(dtype) @ stack.A.to(dtype).T
        low = (low.float() * (gate(u) * stack.scales[0])).to(dtype)
        return output + (low @ stack.B.to(dtype)).to(output.dtype)

    return hook


def _adding(gate: Gate, stack: Stack, layer: Layer) -> Any:
    """The hook for any update: the routing operation itself, with one expert whose weight is the gate."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        u, y = args[0], output.reshape(-1, output.shape[-1])
        flat = u.reshape(-1) if stack.embedding else u.reshape(-1, u.shape[-1])
        weights = gate(y if stack.embedding else flat)  # [N, 1]
        chosen = torch.zeros(weights.shape, dtype=torch.int64, device=y.device)
        return backend("torch").mix(flat, y, stack, chosen, weights, layer).reshape(output.shape)

    return hook


def _size(module: nn.Module, update: Update) -> tuple[int, int] | None:
    return embedding_shape(module) if update.embedding else linear_shape(module)


def encode_path(path: str) -> str:
    """A module path as a key of a ModuleDict, which may not hold dots."""
    return path.replace("%", "%25").replace(".", "%2E")


def decode_path(key: str) -> str:
    return key.replace("%2E", ".").replace("%25", "%")


def match_to_base(base: Base, expert: Expert) -> tuple[Expert, dict[str, str]]:
    """Refuses an expert of another base; else the expert as it stands on this one, and what `placed` says of its modules' names.

    Raises:
        BaseModelError: it was made on another. RoutingError, TrainingError, naming the module: one of its modules is no linear layer of its size here.
    """
    if expert.base is not None:
        check_same_base(expert.base, base.fingerprint, f"expert {expert.name!r}")
    modules = modules_by_path(base.model, expert.updates)
    try:
        here, names = placed(base.model, modules, expert)
    except RoutingError as cause:
        raise TrainingError(str(cause)) from cause
    check_parameters(modules, [here])
    for path, update in here.updates.items():
        if path not in modules:
            raise TrainingError(
                f"expert {expert.name!r} adapts {path}, which this base doesn't have: it belongs to another base."
            )
        found = _size(modules[path], update)
        if found is None or not all(map(sizes_agree, (update.d_in, update.d_out), found)):
            raise TrainingError(
                f"expert {expert.name!r} at {path}: expected a layer of (d_in, d_out) = {(update.d_in, update.d_out)}, "
                f"found {found or type(modules[path]).__name__}: it belongs to another base."
            )
    return here, names


def _write(student: Student, folder: Path) -> None:
    assert isinstance(student, GatedStudent)
    vectors = student.vectors()
    if not any(bool(v.any()) for v in vectors.values()):
        raise TrainingError(
            "no gate moved from zero: the expert does nothing (is its B all zero?), or the learning rate is zero throughout."
        )
    (folder / FILE).write_bytes(tensor_bytes(vectors))


def _digest(expert: Expert) -> str:
    tensors = {
        k: hashlib.sha256(safetensors.torch.save({"": t.contiguous()})).hexdigest()
        for k, t in expert.tensors.items()
    }
    return sha256_json([dict(expert.adapter_config), tensors])


def _cost_share(gate: Mapping[str, Any], expert: Mapping[str, Any]) -> dict[str, float]:
    """What the gate cost divided by what its expert cost, where both are known."""
    known = [k for k in ("seconds", "tokens") if gate.get(k) and expert.get(k)]
    return {key: round(gate[key] / expert[key], 4) for key in known}
