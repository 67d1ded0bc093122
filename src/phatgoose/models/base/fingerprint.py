"""A base's fingerprint: architecture and some weights at fixed positions (docs/bases.md).

Fingerprints are compared by `phatgoose.fingerprints`, which needs no model.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from phatgoose.errors import BaseModelError
from phatgoose.models.base.module_names import plain_name
from phatgoose.records import Fingerprint

EMBEDDING_VALUES = 192
NORM_TENSORS, NORM_VALUES = 16, 4
LINEAR_TENSORS, LINEAR_VALUES = 24, 8

_FIELDS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "decoder_layers": ("num_decoder_layers", "decoder_layers"),
    "attention_heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "intermediate_size": ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim"),
    "vocab_size": ("vocab_size",),
}
"""Architecture field → its names in configs (transformers' attribute_map covers most of GPT-2's and T5's)."""
_NORM = re.compile(r"(norm|(^|[._])ln)[^.]*\.weight$|norm[^.]*$", re.IGNORECASE)


def fingerprint(model: PreTrainedModel, spec: str) -> Fingerprint:
    """The fingerprint of a base, independent of the dtype it is loaded in and of attached routing.

    `samples` has the groups "embedding" (192 values of the input embedding), "norm:NAME" (4 values of each of up to 16
    norm weights) and "linear:NAME" (8 values of each of up to 24 weight matrices). The tensors are spread evenly over
    the model, the positions are a hash of name and shape, the values float32 rounded to 6 significant digits. Packed
    (4-/8-bit) and offloaded tensors are left out; only the samples that two fingerprints share are compared.

    A BaseModelError if the model is wrapped by PEFT, its embedding is packed or not in memory, or a value isn't finite.
    """
    _refuse_adapted(model)
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or not _readable(weight):
        raise BaseModelError(
            f"{spec}: the input embedding is {_describe(weight)}, so this base has no fingerprint. Keep it in memory "
            'and unpacked (a device_map that puts it on a device, not on "disk" or "meta"; GGUF through load_base()).'
        )
    samples = {"embedding": _sample("embedding", weight, EMBEDDING_VALUES)}
    heads = {id(m.weight) for m in (embedding, model.get_output_embeddings()) if m is not None}
    named = [(plain_name(n), p) for n, p in model.named_parameters() if id(p) not in heads]
    norms = [(n, p) for n, p in named if p.dim() == 1 and _NORM.search(n)]
    # Packed matrices are counted here and left out only below, so that packing doesn't change which tensors are chosen.
    linears = [(n, p) for n, p in named if p.dim() == 2 and n.endswith(".weight")]
    for name, tensor in _spread(norms, NORM_TENSORS):
        if _readable(tensor):
            samples[f"norm:{name}"] = _sample(name, tensor, NORM_VALUES)
    for name, tensor in _spread(linears, LINEAR_TENSORS):
        if _readable(tensor):
            samples[f"linear:{name}"] = _sample(name, tensor, LINEAR_VALUES)
    for group, values in samples.items():
        if not all(map(math.isfinite, values)):
            raise BaseModelError(
                f"{spec}: {group!r} holds NaN or infinity. The checkpoint is damaged, or too large for this dtype: "
                'load it with dtype="float32" or "bfloat16".'
            )
    return Fingerprint(spec, architecture(model), samples)


def architecture(model: PreTrainedModel) -> dict[str, Any]:
    """The fields that two bases must share, under the same names for all model families."""
    config = model.config.get_text_config()
    found: dict[str, Any] = {"model_type": config.model_type}
    for field, names in _FIELDS.items():
        values = (getattr(config, name, None) for name in names)
        found[field] = next((v for v in values if v is not None), None)
    found["kv_heads"] = found["kv_heads"] or found["attention_heads"]
    if found["intermediate_size"] is None and found["hidden_size"]:
        found["intermediate_size"] = 4 * found["hidden_size"]  # the meaning of GPT-2's n_inner=None
    found["encoder_decoder"] = bool(model.config.is_encoder_decoder)
    if not found["encoder_decoder"]:
        found["decoder_layers"] = None
    found["tied_embeddings"] = _tied(model)
    return found


def _tied(model: PreTrainedModel) -> bool:
    """Judged by the weights: T5's config says "tied" for every checkpoint, whatever it contains."""
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    if into is None or out is None:
        return False
    a: Any = into.weight
    b: Any = out.weight
    if a is b or (a.device.type != "meta" and a.device == b.device):
        return bool(a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr()))
    # Split over devices, tied weights are two copies of one value.
    name = next((n for n, m in model.named_modules() if m is out), "")
    return f"{name}.weight" in (getattr(model, "all_tied_weights_keys", None) or {})


def _refuse_adapted(model: Any) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise BaseModelError(
                f"{name or type(model).__name__} is wrapped by PEFT ({type(module).__name__}): a base has no adapter. "
                "Pass the model as it was before get_peft_model(), or model.unload()."
            )


def _readable(weight: Tensor) -> bool:
    # Subclasses (bitsandbytes, torchao, GGUF, sharded tensors) may report a floating dtype and hold something else.
    dense = type(weight) in (Tensor, Parameter) and weight.is_floating_point()
    return dense and weight.device.type != "meta" and weight.numel() > 0


def _describe(weight: Any) -> str:
    if not isinstance(weight, Tensor):
        return "missing"
    if weight.device.type == "meta":
        return "offloaded (on the meta device)"
    if not weight.numel():
        return "held elsewhere (empty here)"
    return f"packed ({type(weight).__name__}, {weight.dtype})"


def _spread(items: Sequence[tuple[str, Tensor]], count: int) -> list[tuple[str, Tensor]]:
    """At most `count` of the items at even distances, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def sample_positions(name: str, shape: Sequence[int], count: int) -> list[int]:
    """Flat row-major indices into a tensor: sha256("NAME|D0xD1|i"), its first 8 bytes big-endian, mod numel."""
    key = f"{name}|{'x'.join(map(str, shape))}|"
    digests = (hashlib.sha256(f"{key}{i}".encode()).digest() for i in range(count))
    return [int.from_bytes(digest[:8], "big") % math.prod(shape) for digest in digests]


def _sample(name: str, weight: Tensor, count: int) -> tuple[float, ...]:
    flat = torch.tensor(sample_positions(name, weight.shape, count), device=weight.device)
    values = weight.detach()[torch.unravel_index(flat, weight.shape)]
    return tuple(float(f"{v:.6g}") for v in values.float().tolist())
