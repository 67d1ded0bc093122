"""Which modules of a base an expert adapts, which it can't, and initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phatgoose.errors import TrainingError
from phatgoose.models.base.layers import linear_shape
from phatgoose.registry import unknown


def seeded_normal(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """N(0, 1) in float32 on the CPU. Depends only on the seed, the parameter's name and the shape."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def text_model_prefix(model: PreTrainedModel) -> str:
    """Path of the part of a vision-language model that reads text, with a final dot; "" if that is the whole model."""
    config = model.config
    text = config.get_text_config()
    if text is config or config.is_encoder_decoder:
        return ""
    parts = [path for path, m in model.named_modules() if path and getattr(m, "config", None) is text]
    return f"{parts[0]}." if parts else ""


def target_paths(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers that `targets` means: "all-linear" (all of the text model but its head), or names.

    A name means the layer with that path, or else every layer whose path ends with the name after a dot. If some of
    these are in the part of the model that reads text, only they are meant.

    A TrainingError if a name matches nothing, something that isn't a linear layer, or the output head.
    """
    head, tower = model.get_output_embeddings(), text_model_prefix(model)
    modules, linear = dict(model.named_modules()), _linear_paths(model)
    if targets == "all-linear":
        return sorted(path for path in linear if path.startswith(tower))
    names = [targets] if isinstance(targets, str) else list(targets)
    found: set[str] = set()
    for name in names:
        matches = {p for p in modules if p == name or p.endswith("." + name)}
        if name not in matches:
            matches = {p for p in matches if p.startswith(tower)} or matches
        if not matches:
            known = {p.rpartition(".")[2] for p in linear}
            if isinstance(targets, str):
                known.add("all-linear")
            raise TrainingError(f"target_modules: {unknown('module', name, known)}")
        for path in sorted(matches):
            if modules[path] is head:
                raise TrainingError(
                    f"target_modules: {path} is the output head, which isn't trained here (adapters of it that were "
                    "trained elsewhere can be routed)."
                )
            if path not in linear:
                raise TrainingError(
                    f"target_modules: {path} is a {type(modules[path]).__name__}, not a linear layer; name linear "
                    "layers."
                )
        found |= matches
    return sorted(found)


def _linear_paths(model: PreTrainedModel) -> set[str]:
    """Paths of all linear layers but the output head."""
    head = model.get_output_embeddings()
    return {path for path, m in model.named_modules() if linear_shape(m) is not None and m is not head}


def describe_left_out(model: PreTrainedModel, paths: Collection[str]) -> list[str]:
    """In words: the weights of the model that "all-linear" doesn't adapt although an expert could change them."""
    found, whole = [], sum(p.numel() for p in model.parameters())
    bare = [
        p.numel()
        for path, module in model.named_modules()
        for p in module.parameters(recurse=False)
        if p.ndim == 3 and min(p.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd)
    ]
    if bare:
        found.append(
            f"the matrices of the mixture's experts, which are fused into {len(bare)} parameters instead of linear "
            f"layers ({sum(bare) / whole:.0%} of the base's weights)"
        )
    layers, tower = _linear_paths(model), text_model_prefix(model)
    outside = {path for path in layers if not path.startswith(tower)}
    if outside:
        found.append(
            f"{len(outside)} linear layers outside of {tower[:-1]}, which see no text (name them to train them)"
        )
    if refused := layers - outside - set(paths):
        names = ", ".join(sorted({path.rpartition(".")[2] for path in refused}))
        found.append(
            f"{len(refused)} layers called {names}, which PEFT doesn't adapt in a {model.config.model_type}"
        )
    return found
