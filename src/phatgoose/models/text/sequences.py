"""Rows of different lengths in one forward, each computed as if it were alone.

Padding on the right is exact wherever a token reads only what stands before it, and for encoders, which are given a mask. Padding
on the left lets all targets end in the last column and a cache go on from there, but it shifts every row: it is used only for
models that are told each token's position and keep nothing but keys and values. Models whose values depend on the length of
the row are given rows of one length at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from phatgoose.errors import BaseModelError
from phatgoose.models.base.base import Base, device_of
from phatgoose.models.base.limits import decoder_start
from phatgoose.models.text.batch import IGNORED, UNLIMITED, Encoded, collate, pad_id

SHAREABLE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)
"""Kinds of cache layers that hold keys and values of single tokens, or nothing."""

_POSITIONS_FROM_MASK = ("bloom", "mpt")
"""Without `position_ids`: attention falls off with distance, which padding doesn't change."""
_MASK_IGNORED = ("xlm", "flaubert")
"""Causal attention of these looks at padding, whatever the mask says."""
_LENGTH_READ = ("prophetnet", "xlm-prophetnet")
"""The decoder's relative positions are counted from the length of the whole row."""
_ONE_BY_ONE = ("fsmt",)
"""With a cache, only the last of several new tokens is read, and at the first position (transformers 5.23)."""
_ONE_ROW = ("rwkv",)
"""Going on from the states of several rows mixes them up (transformers 5.23)."""


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has a parameter of this name; **kwargs counts for nothing."""
    return argument in inspect.signature(type(model).forward).parameters


def pads_left(model: PreTrainedModel) -> bool:
    """Whether decoder-only rows may be padded on the left, masked and with `position_ids` where the model takes them."""
    config = model.config
    if config.is_encoder_decoder or config.model_type in (*_MASK_IGNORED, *_LENGTH_READ):
        return False
    if getattr(model, "_is_stateful", False) or _counts_from_padding(model):
        return False
    if not (takes(model, "position_ids") or config.model_type in _POSITIONS_FROM_MASK):
        return False
    try:
        layers = DynamicCache(config=config).layers
    except AttributeError:  # a model without layers as others have them
        return False
    return all(type(layer) in SHAREABLE for layer in layers)


def _counts_from_padding(model: PreTrainedModel) -> bool:
    """Whether positions begin behind the padding token's number, as RoBERTa's do."""
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in model.named_modules()
    )


def together(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Which prompts one `generate` may go on with by `new` tokens: all, or those of one length where padding would be read."""
    longest = max(map(len, prompts), default=0) + new
    if model.config.model_type in _ONE_ROW:
        return [[i] for i in range(len(prompts))]
    if model.config.is_encoder_decoder or (pads_left(model) and longest <= mixes_up_to(model)):
        return [list(range(len(prompts)))]
    alike: dict[int, list[int]] = {}
    for i, tokens in enumerate(prompts):
        alike.setdefault(len(tokens), []).append(i)
    return list(alike.values())


def keeps_cache(model: PreTrainedModel, shortest: int = 0, longest: int = 0) -> bool:
    """Whether going on from a cache computes what reading all tokens anew does, for rows of `shortest` to `longest` tokens."""
    kind = model.config.model_type
    if hasattr(model.config, "expert_capacity") or kind in (*_LENGTH_READ, *_ONE_BY_ONE):
        return False  # what a token gets depends on the tokens that are read with it
    if longest <= mixes_up_to(model):
        return True
    return shortest > mixes_up_to(model) and not _rotation_limits(model.config.to_dict(), None, ("dynamic",))


def shares_cache(model: PreTrainedModel) -> bool:
    """Whether a prompt's cache may be kept and gone on with, as far as can be told before there is one."""
    return (
        keeps_cache(model)
        and takes(model, "use_cache")
        and (bool(model.config.is_encoder_decoder) or pads_left(model))
    )


def keeps_only_keys(cache: Any) -> bool:
    """Whether this cache, that a model returned, holds keys and values of single tokens and nothing else."""
    if isinstance(cache, EncoderDecoderCache):
        return keeps_only_keys(cache.self_attention_cache) and keeps_only_keys(cache.cross_attention_cache)
    # A subclass keeps more, as MiniMax's does.
    return type(cache) is DynamicCache and all(type(layer) in SHAREABLE for layer in cache.layers)


def may_look_ahead(model: PreTrainedModel) -> bool:
    """Whether a decoder-only model with a cache may all the same attend to later tokens, as PaliGemma does in a prompt."""
    config = model.config
    if config.is_encoder_decoder:
        return False
    return config.get_text_config() is not config or bool(
        getattr(config, "use_bidirectional_attention", False)
    )


def check_rows(model: PreTrainedModel) -> None:
    """Refuses a model whose scores of a row mean nothing, or depend on the rows beside it. Runs it once on eight tokens.

    Raises:
        BaseModelError: tokens attend to later ones, or the rows of a batch compete for places at experts.
    """
    kind, config = type(model).__name__, model.config
    if config.model_type == "nllb-moe" and config.moe_eval_capacity_token_fraction < 1:
        raise BaseModelError(
            f"{kind}: with moe_eval_capacity_token_fraction={config.moe_eval_capacity_token_fraction} the tokens of a batch compete "
            "for places at experts, so a row's score depends on the others: set it to 1."
        )
    if config.is_encoder_decoder:
        return
    if config.model_type in _LENGTH_READ:
        raise BaseModelError(
            f"{kind} computes each token from the length of the whole row, so its probabilities depend on what follows: use the "
            "encoder–decoder of this architecture."
        )
    ids = (
        torch.tensor([[2, 3, 4, 5], [2, 3, 4, 6]], device=device_of(model))
        % config.get_text_config().vocab_size
    )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            first, second = model(input_ids=ids).logits[:, :-1].float()
    finally:
        for module in training:
            module.training = True
    if float((first - second).abs().max()) > 0.01 * float(first.abs().max()):
        raise BaseModelError(
            f"{kind} reads the tokens that it is to predict: its attention isn't causal, so log-likelihoods of an answer mean nothing. "
            "Take a causal language model (or set config.is_decoder=True, where the architecture has that)."
        )


def batch_of(base: Base, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """`collate`, padded as the base wants it."""
    seq2seq, pad = base.is_encoder_decoder, pad_id(base.tokenizer)
    if not seq2seq:
        # The padding token's embedding may be zero, where the root of Gemma-3n's magnitudes has no gradient: NaN for every row.
        zero = getattr(base.model.get_input_embeddings(), "padding_idx", None)
        pad = next((token for row in rows for token in row.prompt_ids if token != zero), pad)
    return collate(rows, pad, is_encoder_decoder=seq2seq, left=pads_left(base.model))


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """What a decoder reads to predict `labels` [B, L]: its start token, and each label but the last. Behind a row's end stand
    start tokens, which no real token sees."""
    start = decoder_start(model)
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, start)


def target_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, L, V] in the model's dtype that predict `batch["labels"]` [B, L], from a batch that `collate` made.

    Decoder-only models are asked for no more positions than hold the targets (`logits_to_keep`; L + 1 where padding is on the
    left); a model whose forward doesn't know that argument computes all: same values, more memory.
    """
    inner, mask, labels = _inner(model), batch["attention_mask"], batch["labels"]
    same = bool(mask.all()) and bool((labels != IGNORED).all())
    if same or max(mask.shape[1], labels.shape[1]) <= mixes_up_to(inner):
        return _target_logits(model, inner, batch)
    found: list[Tensor] = []
    for row, real in enumerate(mask.bool()):
        kept = labels[row] != IGNORED
        alone = {
            "input_ids": batch["input_ids"][row, real][None],
            "attention_mask": mask[row, real][None],
            "labels": labels[row, kept][None],
        }
        logits = _target_logits(model, inner, alone)[0]
        found.append(
            logits.new_zeros(labels.shape[1], logits.shape[-1]).masked_scatter(kept[:, None], logits)
        )
    return torch.stack(found)


def _target_logits(model: Any, inner: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    labels, inputs = batch["labels"], {"input_ids": batch["input_ids"]}
    settings: dict[str, Any] = {"use_cache": False} if takes(inner, "use_cache") else {}
    if takes(inner, "attention_mask"):
        inputs["attention_mask"] = batch["attention_mask"]
    if inner.config.is_encoder_decoder:
        return model(**inputs, decoder_input_ids=decoder_inputs(inner, labels), **settings).logits
    if "position_ids" in batch and takes(inner, "position_ids"):
        inputs["position_ids"] = batch["position_ids"]
    length, width = batch["input_ids"].shape[1], labels.shape[1]
    ends = length - batch["attention_mask"].flip(-1).argmax(-1, keepdim=True)
    places = (ends - 1 - width + torch.arange(width, device=ends.device)).clamp(min=0)
    first = int(places[labels != IGNORED].min())
    left = bool((ends == length).all())
    keep = width + 1 if left else length - first
    if takes(inner, "logits_to_keep"):
        settings["logits_to_keep"] = keep
    logits = model(**inputs, **settings).logits[:, -keep:]
    if left:
        return logits[:, :-1]
    places = (places - first).clamp(min=0).to(logits.device)
    return logits[torch.arange(len(places), device=logits.device)[:, None], places]


def mixes_up_to(model: PreTrainedModel) -> int:
    """The most tokens of a row with which rows of different lengths may stand in one forward at all."""
    config = model.config
    if config.model_type in _LENGTH_READ:
        return 0
    found = _rotation_limits(config.to_dict(), getattr(config, "max_position_embeddings", None))
    return min(found, default=UNLIMITED)


def _rotation_limits(
    settings: Any, context: int | None, kinds: Sequence[str] = ("dynamic", "longrope")
) -> list[int]:
    """Lengths of a row behind which rotary embeddings change for all of its tokens, at any depth of a model's settings."""
    if not isinstance(settings, dict):
        return []
    found = []
    if settings.get("rope_type", settings.get("type")) in kinds:
        found = [int(settings.get("original_max_position_embeddings") or context or 0)]
    return found + [limit for value in settings.values() for limit in _rotation_limits(value, context, kinds)]


def _inner(model: Any) -> Any:
    """The transformers model inside its wrappers: torch.compile, data parallel, PEFT."""
    while not hasattr(model, "config"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    # A compiled module passes attributes through, but not its signature.
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
