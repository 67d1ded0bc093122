"""A base's modules and their sizes from its configuration alone; its fingerprint if its weights are on this machine."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from phatgoose.experts.pool import Pool
from phatgoose.experts.reference_checkpoint import COPIES, BaseShape
from phatgoose.models.attach.modules import check_parameters, module_at
from phatgoose.models.attach.placement import placed_pool
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.layers import linear_shape, same_weights
from phatgoose.models.base.load import Source, find, quiet, read_config, read_model
from phatgoose.models.base.load_errors import refusals
from phatgoose.models.base.load_options import load_options
from phatgoose.models.moe.names import inside_mixture, modules_of

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
    with quiet(source.copy):
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
    if not any(inside_mixture(path) for path in pool.modules):
        return
    model = empty_model(_source(spec))
    modules = modules_of(model, pool.modules)
    placed = placed_pool(model, modules, pool)[0]
    check_parameters(modules, placed.experts)
    for path in placed.modules:
        module_at(modules, path, placed)


def _source(spec: str | os.PathLike[str]) -> Source:
    folder = Path(spec).expanduser()
    there = (folder / "config.json").is_file()  # which is enough, where load_base wants weights beside it
    return Source(os.fspath(spec), str(folder), folder=folder) if there else find(os.fspath(spec), None)


def empty_model(source: Source) -> PreTrainedModel:
    """The model without values, on the meta device."""
    with quiet(source.copy):
        config = read_config(source)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with refusals(source.spec, "the modules", source.folder), torch.device("meta"):
            return family.from_config(config, trust_remote_code=False)


def _weights_are_here(source: Source) -> bool:
    """Whether `load_base` would find safetensors without a download."""
    if source.folder is not None:
        return any((Path(source.folder) / name).is_file() for name in _WEIGHTS)
    found = (try_to_load_from_cache(source.place, name, revision=source.revision) for name in _WEIGHTS)
    return any(isinstance(path, str) for path in found)
