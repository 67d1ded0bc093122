"""Bases without weights in memory: from the configuration alone, or mapped from files."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import BaseModelError
from phatgoose.experts.pool import Pool
from phatgoose.experts.reference_checkpoint import COPIES, BaseShape
from phatgoose.files import read_json
from phatgoose.models.attach.modules import check_parameters, module_at, pool_on_model
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.gguf import ALIASES, has_copy
from phatgoose.models.base.layers import linear_shape, same_weights
from phatgoose.models.base.load import Source, find_source, hide_progress_bars, load_base, load_options
from phatgoose.models.base.load_errors import explain_load_errors
from phatgoose.models.moe.names import is_expert_path, modules_by_path

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def base_shape(spec: str | os.PathLike[str]) -> BaseShape:
    """What importing a reference checkpoint needs to know about a base. No tokenizer is needed.

    For a Hub model only the configuration is fetched. Weights that are on this machine already are read for the
    fingerprint and released again.

    A BaseModelError, as by `load_base`, if there is no such base or it can't be used.
    """
    source = find_source(spec, needs_weights=False)
    model = source.empty_model()
    modules = model.named_modules(remove_duplicate=False)
    linears = {path: shape for path, m in modules if (shape := linear_shape(m)) is not None}
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    both = bool(model.config.is_encoder_decoder)
    if not _has_local_weights(source):
        return BaseShape(source.spec, linears, parameters, both)
    whole = source.model(load_options())
    paths = {name.rpartition(".")[0] for name in COPIES}
    own = {path: m for path, m in whole.named_modules(remove_duplicate=False) if path in paths}
    found = fingerprint(whole, source.spec)
    del whole  # all but the embeddings, which `own` holds
    gc.collect()

    def is_own(name: str, tensor: Tensor) -> bool:
        path, _, kind = name.rpartition(".")
        return path in own and same_weights(own[path], kind, tensor)

    return BaseShape(source.spec, linears, parameters, both, found, is_own)


def check_mixture(spec: str, pool: Pool) -> None:
    """Refuses, as `route` would, updates inside a mixture's experts that this base can't route.

    It reads the base's configuration alone, because bases with mixtures are large. It does nothing for other pools.
    """
    if not any(is_expert_path(path) for path in pool.modules):
        return
    model = find_source(spec, needs_weights=False).empty_model()
    modules = modules_by_path(model, pool.modules)
    placed = pool_on_model(model, modules, pool)[0]
    check_parameters(modules, placed.experts)
    for path in placed.modules:
        module_at(modules, path, placed)


def _has_local_weights(source: Source) -> bool:
    """True if `load_base` would find safetensors without a download."""
    if isinstance(source.place, Path):
        return any((source.place / name).is_file() for name in _WEIGHTS)
    found = (try_to_load_from_cache(source.place, name, revision=source.revision) for name in _WEIGHTS)
    return any(isinstance(path, str) for path in found)


def mapped_base(spec: str, revision: str | None = None) -> PreTrainedModel:
    """The model in its checkpoint's dtype, on the CPU, in eval mode. Weights are mapped from the files, read on use.

    This is for reading a few values of a model of any size, or for running a part of it. If transformers must rename or
    change the checkpoint's tensors, they can't be mapped; the base is then loaded into memory as by `load_base`.

    A BaseModelError as by `load_base`, or if the weights are packed (AWQ, GPTQ, FP8, …).
    """
    return _mapped(find_source(spec, revision), fetch=True)


def why_not_at_hand(spec: str) -> str | None:
    """Why a base's weights can't be read from this machine's own files; None if they can. Nothing is fetched or
    converted, but for a GGUF file that lies here."""
    if spec in ALIASES:
        return None if has_copy(spec) else "it hasn't been fetched yet"
    if spec.lower().endswith(".gguf") and not os.path.exists(spec):
        return "there is no such file here"  # on the Hub, it would be fetched
    try:
        source = find_source(spec)
    except BaseModelError as error:
        return str(error)
    if isinstance(source.place, Path):
        return None
    try:
        folder = _cached(source)
    except LocalEntryNotFoundError:
        folder = None
    except HFValidationError:
        return "there is no such folder here, and it is not a Hub id"
    return None if folder is not None and _is_whole(folder) else "it isn't in the Hub's cache"


def base_at_hand(spec: str) -> PreTrainedModel:
    """`mapped_base` of files on this machine, after `why_not_at_hand` found that they are here. A BaseModelError if
    they can't be read."""
    return _mapped(find_source(spec), fetch=False)


def _cached(source: Source) -> Path:
    """The folder of a Hub model in the Hub's cache, of which some files may be missing. Nothing is asked."""
    patterns = ["*.json", "*.safetensors"]
    found = snapshot_download(
        str(source.place), revision=source.revision, allow_patterns=patterns, local_files_only=True
    )
    return Path(found)


def _is_whole(folder: Path) -> bool:
    """Whether every file of weights is there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_json(index, BaseModelError).get("weight_map", {})
    return all((folder / name).is_file() for name in set(shards.values()))


def _mapped(source: Source, *, fetch: bool) -> PreTrainedModel:
    model = source.empty_model(buffers=True)
    if getattr(model.config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"{source.spec} is packed in 8 bits or fewer, but its original weights are needed. Take the unpacked base."
        )
    found: dict[str, Tensor] = {}
    folder = source.place
    if isinstance(folder, str):
        patterns = ["*.json", "*.safetensors"]
        with source.explain("the weights"):
            folder = (
                Path(snapshot_download(folder, revision=source.revision, allow_patterns=patterns))
                if fetch
                else _cached(source)
            )
    with explain_load_errors(source.spec, "the weights", folder):
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
    if not _can_map(model, found):
        with hide_progress_bars(True):
            return load_base(source.spec).model
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _can_map(model: PreTrainedModel, found: dict[str, Tensor]) -> bool:
    """True if the files hold every parameter under its own name (tied ones may be missing), and nothing else."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
    floats = all(t.is_floating_point() and t.dtype.itemsize >= 2 for t in found.values())
    return (
        floats
        and wanted.keys() - found.keys() <= tied
        and all(n in wanted and t.shape == wanted[n] for n, t in found.items())
        and not any(b.device == torch.device("meta") and n in found for n, b in model.named_buffers())
    )
