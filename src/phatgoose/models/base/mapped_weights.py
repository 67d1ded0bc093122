"""A base whose weights are mapped into memory, not read: to look at a few values of a model of any size."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import BaseModelError
from phatgoose.models.base.load import find, load_base, quiet
from phatgoose.models.base.load_errors import refusals
from phatgoose.models.base.without_weights import empty_model


def mapped_base(spec: str, revision: str | None = None) -> PreTrainedModel:
    """The model as its checkpoint has it, in eval mode, on the CPU. Its values are read from the files where they are used.

    Where a checkpoint's tensors aren't named as the model's, as transformers' own way of reading them must change them, it is
    loaded as `load_base` does, and is in memory as a whole.

    Raises:
        BaseModelError: as `load_base`, or its weights are packed (AWQ, GPTQ, FP8, …), so that the files hold no values of it.
    """
    source = find(spec, revision)
    model = empty_model(source)
    if getattr(model.config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"{source.spec} is packed in 8 bits or fewer, where its own weights are needed. Take the unpacked base."
        )
    folder = source.folder
    if folder is None:
        with refusals(source.spec, "the weights", None, source.tried):
            patterns = ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(source.place, revision=source.revision, allow_patterns=patterns))
    with refusals(source.spec, "the weights", folder):
        found = _tensors(folder)
    if not _fits(model, found):
        with quiet(True):
            return load_base(spec, revision=revision).model
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _fits(model: PreTrainedModel, found: dict[str, Tensor]) -> bool:
    """Whether every parameter is there under its own name, but for those that are tied to another, and nothing else."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
    missing = wanted.keys() - found.keys()
    floats = all(t.is_floating_point() and t.dtype.itemsize >= 2 for t in found.values())
    return (
        floats
        and missing <= tied
        and all(n in wanted and t.shape == wanted[n] for n, t in found.items())
        and not any(b.device == torch.device("meta") and n in found for n, b in model.named_buffers())
    )
