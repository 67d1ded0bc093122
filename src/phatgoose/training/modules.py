"""Which modules an expert adapts, the sizes of a linear layer whatever its kind, and first values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import TrainingError
from phatgoose.registry import unknown


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [d_in, d_out]."""
    return isinstance(module, Conv1D)


def normal(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """N(0, 1) in float32 on the CPU, from the seed and a parameter's name alone: whatever else is trained, on any device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, None for anything else. Packed layers are asked, not their weight's shape."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def target_paths(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers that `targets` means: "all-linear" (all but the output head), or names.

    A name means the layer of that path, and every layer whose path ends in it at a dot.

    Raises:
        TrainingError: a name matches nothing, or something that isn't a linear layer, or the output head.
    """
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    linear = {path for path, m in modules.items() if sizes(m) is not None and m is not head}
    if targets == "all-linear":
        return sorted(linear)
    names = [targets] if isinstance(targets, str) else list(targets)
    found: set[str] = set()
    for name in names:
        matches = {p for p in modules if p == name or p.endswith("." + name)}
        if not matches:
            known = {p.rpartition(".")[2] for p in linear} | (
                {"all-linear"} if isinstance(targets, str) else set()
            )
            raise TrainingError(f"target_modules: {unknown('module', name, known)}")
        for path in sorted(matches):
            if modules[path] is head:
                raise TrainingError(
                    f"target_modules: {path} is the output head, which isn't trained here (adapters of it that were trained elsewhere can be routed)."
                )
            if path not in linear:
                raise TrainingError(
                    f"target_modules: {path} is a {type(modules[path]).__name__}, not a linear layer; name linear layers."
                )
        found |= matches
    return sorted(found)
