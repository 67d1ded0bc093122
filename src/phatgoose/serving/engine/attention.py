"""Attention for continuous batching on CPUs.

transformers packs the sequences of a pass into one row. Its own way of keeping them apart without FlashAttention is one mask over
all pairs of tokens, so that most of the attention computed is thrown away (at 64 sequences, 63 parts of 64). Here each sequence
attends by itself. Registered as transformers' AttentionInterface asks for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "phatgoose_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, D] of packed sequences → [1, T, H, D].

    Without a paged cache (a pass that isn't of the continuous batching) it is transformers' own SDPA.
    """
    if cache is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    starts, key_starts = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    for a, b, c, d in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        found = _one(query[:, :, a:b], key[:, :, c:d], value[:, :, c:d], scaling)
        out[:, a:b] = found.transpose(1, 2)
    return out, None


def _one(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of one sequence whose last tokens ask: query [1, H, q, D], keys [1, H_kv, n, D] → [1, H, q, D]."""
    heads, asked, known = query.shape[1], query.shape[2], key.shape[2]
    shared = heads // key.shape[1]
    if asked == 1:  # every key is visible, so heads that share keys can be rows
        rows = query.reshape(1, key.shape[1], shared, query.shape[-1])
        return F.scaled_dot_product_attention(rows, key, value, scale=scaling).reshape(1, heads, 1, -1)
    mask = None
    if asked < known:
        mask = torch.ones(asked, known, dtype=torch.bool, device=query.device).tril(known - asked)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=shared > 1
    )


def fits(model: PreTrainedModel) -> bool:
    """Whether this attention is the model's own on this device: CPU, SDPA, and every layer attends to all that came before."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if not getattr(config, "layer_types", None) else None
    own = model.config._attn_implementation == "sdpa"
    return model.device.type == "cpu" and own and kinds == {"full_attention"} and window is None


def register() -> str:
    """Makes the attention known to transformers; its name."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
