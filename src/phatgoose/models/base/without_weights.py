"""A base's modules and their sizes from its configuration alone; its fingerprint if its weights are on this machine."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from phatgoose.errors import BaseModelError
from phatgoose.experts.pool import Pool
from phatgoose.experts.reference_checkpoint import COPIES, BaseShape
from phatgoose.models.attach.modules import check_parameters, module_at
from phatgoose.models.attach.placement import placed_pool
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.layers import linear_shape, same_weights
from phatgoose.models.base.load import (
    Source,
    find_source,
    hide_progress_bars,
    load_base,
    read_config,
    read_model,
)
from phatgoose.models.base.load_errors import explain_load_errors
from phatgoose.models.base.load_options import load_options
from phatgoose.models.moe.names import is_expert_path, modules_by_path

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def base_shape(spec: str | os.PathLike[str]) -> BaseShape:
    """What importing a reference checkpoint must know of a base. Of a Hub model only the configuration is fetched; weights that
    are here already are read for the fingerprint, and let go of again. No tokenizer is needed.

    Raises:
        BaseModelError: as `load_base` does, for a base that isn't there or whose configuration or weights can't be used.
    """
    source = _source(spec)
    model = empty_model(source)
    modules = model.named_modules(remove_duplicate=False)
    linears = {path: shape for path, m in modules if (shape := linear_shape(m)) is not None}
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    both = bool(model.config.is_encoder_decoder)
    if not _weights_are_here(source):
        return BaseShape(source.spec, linears, parameters, both)
    with hide_progress_bars(source.copy):
        whole = read_model(source, read_config(source), load_options("auto", None, None, None))
    own = {
        path: m
        for path, m in whole.named_modules(remove_duplicate=False)
        if any(name.rpartition(".")[0] == path for name in COPIES)
    }
    found = fingerprint(whole, source.spec)
    del whole  # but for the embeddings
    gc.collect()

    def is_own(name: str, tensor: Tensor) -> bool:
        path, _, kind = name.rpartition(".")
        return path in own and same_weights(own[path], kind, tensor)

    return BaseShape(source.spec, linears, parameters, both, found, is_own)


def check_mixture(spec: str, pool: Pool) -> None:
    """Refuses experts inside a mixture's experts that this base can't route, from its configuration alone: such bases are large.

    Does nothing for other pools.

    Raises:
        RoutingError: as `route` would. BaseModelError: the base isn't there, or its configuration can't be used.
    """
    if not any(is_expert_path(path) for path in pool.modules):
        return
    model = empty_model(_source(spec))
    modules = modules_by_path(model, pool.modules)
    placed = placed_pool(model, modules, pool)[0]
    check_parameters(modules, placed.experts)
    for path in placed.modules:
        module_at(modules, path, placed)


def _source(spec: str | os.PathLike[str]) -> Source:
    folder = Path(spec).expanduser()
    there = (folder / "config.json").is_file()  # which is enough, where load_base wants weights beside it
    return (
        Source(os.fspath(spec), str(folder), folder=folder) if there else find_source(os.fspath(spec), None)
    )


def empty_model(source: Source) -> PreTrainedModel:
    """The model without values, on the meta device."""
    with hide_progress_bars(source.copy):
        config = read_config(source)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with explain_load_errors(source.spec, "the modules", source.folder), torch.device("meta"):
            return family.from_config(config, trust_remote_code=False)


def _weights_are_here(source: Source) -> bool:
    """Whether `load_base` would find safetensors without a download."""
    if source.folder is not None:
        return any((Path(source.folder) / name).is_file() for name in _WEIGHTS)
    found = (try_to_load_from_cache(source.place, name, revision=source.revision) for name in _WEIGHTS)
    return any(isinstance(path, str) for path in found)


def mapped_base(spec: str, revision: str | None = None) -> PreTrainedModel:
    """The model as its checkpoint has it, in eval mode, on the CPU. Its values are read from the files where they are used.

    Where a checkpoint's tensors aren't named as the model's, as transformers' own way of reading them must change them, it is
    loaded as `load_base` does, and is in memory as a whole.

    Raises:
        BaseModelError: as `load_base`, or its weights are packed (AWQ, GPTQ, FP8, …), so that the files hold no values of it.
    """
    source = find_source(spec, revision)
    model = empty_model(source)
    if getattr(model.config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"{source.spec} is packed in 8 bits or fewer, where its own weights are needed. Take the unpacked base."
        )
    folder = source.folder
    if folder is None:
        with explain_load_errors(source.spec, "the weights", None, source.tried):
            patterns = ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(source.place, revision=source.revision, allow_patterns=patterns))
    with explain_load_errors(source.spec, "the weights", folder):
        found = _tensors(folder)
    if not _fits(model, found):
        with hide_progress_bars(True):
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
