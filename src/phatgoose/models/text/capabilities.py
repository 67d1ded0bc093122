"""What an architecture allows: left padding, rows of mixed length, a shared cache.

Rows of different lengths run in one forward pass only where each is computed as if it were alone:

- Padding on the right is exact if a token reads only what stands before it, and for encoders, which get a mask.
- Padding on the left lets all targets end in the last column, where a cache can go on. But it shifts every row, so it
  is used only for models that take each token's position and keep nothing but keys and values.
- Models whose values depend on the length of the row get rows of one length at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from phatgoose.errors import BaseModelError
from phatgoose.models.base.base import device_of, eval_mode
from phatgoose.models.context.memory import DummyLayer, MemoryLayer
from phatgoose.models.text.encoding import UNLIMITED

SHAREABLE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)
"""Kinds of cache layers that hold keys and values of single tokens, or nothing."""

_POSITIONS_FROM_MASK = ("bloom", "mpt")
"""They take no `position_ids`: their attention falls off with distance, which padding doesn't change."""
_IGNORE_MASK = ("xlm", "flaubert")
"""Their causal attention reads padding, whatever the mask says."""
_READ_LENGTH = ("prophetnet", "xlm-prophetnet")
"""Their decoder counts relative positions from the length of the whole row."""
_ONE_TOKEN_AT_A_TIME = ("fsmt",)
"""With a cache they read only the last of several new tokens, and at the first position (transformers 5.23)."""
_ONE_ROW_AT_A_TIME = ("rwkv",)
"""Continuing from the states of several rows mixes these up (transformers 5.23)."""


def accepts_argument(model: PreTrainedModel, argument: str) -> bool:
    """True if the model's forward has a parameter of this name. **kwargs doesn't count."""
    return argument in inspect.signature(type(model).forward).parameters


def supports_left_padding(model: PreTrainedModel) -> bool:
    """True if decoder-only rows may be padded on the left, with a mask and, if the model takes them, position_ids."""
    config = model.config
    if config.is_encoder_decoder or config.model_type in (*_IGNORE_MASK, *_READ_LENGTH):
        return False
    if getattr(model, "_is_stateful", False) or _offsets_positions(model):
        return False
    if not (accepts_argument(model, "position_ids") or config.model_type in _POSITIONS_FROM_MASK):
        return False
    return has_cache_layers(model, SHAREABLE)


def has_cache_layers(model: PreTrainedModel, kinds: tuple[type, ...]) -> bool:
    """True if every layer of the model's own cache is exactly of one of these classes."""
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError:  # the configuration doesn't list layers as others do
        return False
    return all(type(layer) in kinds for layer in layers)


def _offsets_positions(model: PreTrainedModel) -> bool:
    """True if position ids begin after the padding token's id, as RoBERTa's do."""
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in model.named_modules()
    )


def generation_groups(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Groups of prompts, by index, that one call of `generate` may continue by `new` tokens.

    All are one group, unless the model would read padding: then each group has prompts of one length.
    """
    longest = max(map(len, prompts), default=0) + new
    if model.config.model_type in _ONE_ROW_AT_A_TIME:
        return [[i] for i in range(len(prompts))]
    if model.config.is_encoder_decoder or (
        supports_left_padding(model) and longest <= max_mixed_length(model)
    ):
        return [list(range(len(prompts)))]
    same_length: dict[int, list[int]] = {}
    for i, tokens in enumerate(prompts):
        same_length.setdefault(len(tokens), []).append(i)
    return list(same_length.values())


def supports_cache(model: PreTrainedModel, shortest: int = 0, longest: int = 0) -> bool:
    """True if rows of `shortest` to `longest` tokens get the same values with a cache as without one."""
    kind = model.config.model_type
    # `expert_capacity`: what a token gets depends on which tokens are read together with it.
    if hasattr(model.config, "expert_capacity") or kind in (*_READ_LENGTH, *_ONE_TOKEN_AT_A_TIME):
        return False
    if longest <= max_mixed_length(model):
        return True
    return shortest > max_mixed_length(model) and not _rope_limits(model.config.to_dict(), None, ("dynamic",))


def supports_shared_cache(model: PreTrainedModel) -> bool:
    """True if a prompt's cache may be kept and continued several times, as far as can be told before there is one."""
    return (
        supports_cache(model)
        and accepts_argument(model, "use_cache")
        and (bool(model.config.is_encoder_decoder) or supports_left_padding(model))
    )


def is_plain_cache(cache: Any) -> bool:
    """True if a cache that a model returned holds keys and values of single tokens and nothing else."""
    if isinstance(cache, EncoderDecoderCache):
        return is_plain_cache(cache.self_attention_cache) and is_plain_cache(cache.cross_attention_cache)
    # The exact class: a subclass, such as MiniMax's, keeps more.
    return type(cache) is DynamicCache and all(
        type(layer) in (*SHAREABLE, MemoryLayer) for layer in cache.layers
    )


def may_attend_ahead(model: PreTrainedModel) -> bool:
    """True if a decoder-only model with a cache may still attend to later tokens, as PaliGemma does within a prompt."""
    config = model.config
    if config.is_encoder_decoder:
        return False
    bidirectional = bool(getattr(config, "use_bidirectional_attention", False))
    return config.get_text_config() is not config or bidirectional


def check_scorable(model: PreTrainedModel) -> None:
    """Refuses (BaseModelError) a model whose tokens attend to later ones, or whose rows compete for places at experts.

    Its scores would mean nothing, or depend on the other rows of a batch. Runs it once, on eight tokens.
    """
    kind, config = type(model).__name__, model.config
    if config.model_type == "nllb-moe" and config.moe_eval_capacity_token_fraction < 1:
        raise BaseModelError(
            f"{kind}: with moe_eval_capacity_token_fraction={config.moe_eval_capacity_token_fraction} the tokens of a "
            "batch compete for places at experts, so a row's score depends on the others: set it to 1."
        )
    if config.is_encoder_decoder:
        return
    if config.model_type in _READ_LENGTH:
        raise BaseModelError(
            f"{kind} computes each token from the length of the whole row, so its probabilities depend on what "
            "follows: use the encoder–decoder of this architecture."
        )
    # Two rows that differ in their last token only: earlier logits must not change.
    ids = torch.tensor([[2, 3, 4, 5], [2, 3, 4, 6]], device=device_of(model))
    with eval_mode(model):
        first, second = model(input_ids=ids % config.get_text_config().vocab_size).logits[:, :-1].float()
    if float((first - second).abs().max()) > 0.01 * float(first.abs().max()):
        raise BaseModelError(
            f"{kind} reads the tokens that it is to predict: its attention isn't causal, so log-likelihoods of an "
            "answer mean nothing. Take a causal language model (or set config.is_decoder=True, if the architecture has "
            "that)."
        )


def max_mixed_length(model: PreTrainedModel) -> int:
    """The longest row with which rows of different lengths may share a forward pass."""
    config = model.config
    if config.model_type in _READ_LENGTH:
        return 0
    limits = _rope_limits(config.to_dict(), getattr(config, "max_position_embeddings", None))
    return min(limits, default=UNLIMITED)


def _rope_limits(
    settings: Any, context: int | None, kinds: Sequence[str] = ("dynamic", "longrope")
) -> list[int]:
    """Row lengths beyond which rotary embeddings change for all tokens, at any depth of a model's settings."""
    if not isinstance(settings, dict):
        return []
    found = []
    if settings.get("rope_type", settings.get("type")) in kinds:
        found = [int(settings.get("original_max_position_embeddings") or context or 0)]
    return found + [limit for value in settings.values() for limit in _rope_limits(value, context, kinds)]
