"""Encoded rows → tensors of one batch, and the logits of their targets.

Decoder-only batches are padded on the left if the model supports it (`capabilities.py`). Every target then ends in the
last column, and the logits of the last L+1 positions predict the targets. All other batches are padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import TaskError
from phatgoose.models.base.base import Base, decoder_start
from phatgoose.models.text.capabilities import accepts_argument, max_mixed_length, supports_left_padding
from phatgoose.models.text.encoding import Encoded

IGNORED = -100
"""Label of a position that isn't a target."""


def make_batch(base: Base, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """`collate`, padded as this base needs it."""
    seq2seq, pad = base.is_encoder_decoder, pad_id(base.tokenizer)
    if not seq2seq:
        # The padding token's embedding may be zero. In Gemma-3n the root of its magnitude then has no gradient, which
        # makes every row NaN; so a token of a prompt is used instead.
        zero = getattr(base.model.get_input_embeddings(), "padding_idx", None)
        pad = next((token for row in rows for token in row.prompt_ids if token != zero), pad)
    return collate(rows, pad, is_encoder_decoder=seq2seq, left=supports_left_padding(base.model))


def prompt_batch(base: Base, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """`make_batch` without targets, for the encoder or the decoder that reads the prompts."""
    batch = make_batch(base, [replace(row, target_ids=()) for row in rows])
    del batch["labels"]
    return batch


def collate(
    encoded: Sequence[Encoded], pad_id: int, *, is_encoder_decoder: bool, left: bool = True
) -> dict[str, Tensor]:
    """Tensors of one batch, all int64. B is the number of rows, L the length of the longest target.

    Decoder-only: `input_ids` and `attention_mask` [B, T], where T is the longest prompt + target, padded on the left
    and with `position_ids` (without `left`: on the right); and `labels` [B, L]: the targets alone, right-aligned, -100
    elsewhere. Encoder–decoder: `input_ids`, `attention_mask` [B, S] and `labels` [B, L], padded on the right.
    """
    if is_encoder_decoder:
        input_ids, mask = pad_rows([e.prompt_ids for e in encoded], pad_id, left=False)
        labels = _pad([e.target_ids for e in encoded], IGNORED, left=False)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    input_ids, mask = pad_rows([e.prompt_ids + e.target_ids for e in encoded], pad_id, left=left)
    labels = _pad([e.target_ids for e in encoded], IGNORED, left=True)
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {**batch, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left else batch


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [rows, longest], padded on the left or on the right."""
    return _pad(rows, pad_id, left=left), _pad([(1,) * len(row) for row in rows], 0, left=left)


def _pad(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    fill = [(value,) * (width - len(row)) for row in rows]
    whole = [(*f, *r) if left else (*r, *f) for f, r in zip(fill, rows, strict=True)]
    return torch.tensor(whole, dtype=torch.long)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end token if there is none. (Padding is masked, so the choice doesn't matter.)"""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise TaskError("the tokenizer has neither a padding nor an end token.")
    return int(found)


def length_batches(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices into `lengths` in batches of similar length, the longest first: out of memory then shows at once.

    A batch has at most `max_rows` rows and, padded to its longest, at most `max_tokens` tokens. (A single longer row is
    a batch of its own.) Every index comes exactly once; rows of equal length keep their order.
    """
    if max_rows < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"max_rows and max_tokens must be at least 1, got {max_rows} and {max_tokens}")
    batch: list[int] = []
    size = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and len(batch) >= size:
            yield batch
            batch = []
        if not batch:  # the first row of a batch is its longest, so it decides how many fit
            fits = max_rows if max_tokens is None else max_tokens // max(1, lengths[index])
            size = max(1, min(max_rows, fits))
        batch.append(index)
    if batch:
        yield batch


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The decoder's input that predicts `labels` [B, L]: its start token, then each label but the last.

    Start tokens also stand after a row's end, where no real token sees them.
    """
    start = decoder_start(model)
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, start)


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of −log p over all targets, computed in float32: a float32 scalar.

    Args:
        logits: [B, L, V], any float dtype; position i predicts labels[:, i].
        labels: [B, L] int64, -100 at positions without a target.
    """
    chosen = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum")


def target_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, L, V], in the model's dtype, that predict `batch["labels"]` [B, L] of a batch made by `collate`.

    Decoder-only models are asked only for the positions that hold targets (`logits_to_keep`; L + 1 of them with left
    padding). A model whose forward doesn't have that argument computes all positions: same values, more memory.
    """
    inner, mask, labels = _unwrap(model), batch["attention_mask"], batch["labels"]
    unpadded = bool(mask.all()) and bool((labels != IGNORED).all())
    if unpadded or max(mask.shape[1], labels.shape[1]) <= max_mixed_length(inner):
        return _target_logits(model, inner, batch)
    # Padding would change this model's values at such a length: every row runs alone.
    found: list[Tensor] = []
    for row, real in enumerate(mask.bool()):
        kept = labels[row] != IGNORED
        alone = {
            "input_ids": batch["input_ids"][row, real][None],
            "attention_mask": mask[row, real][None],
            "labels": labels[row, kept][None],
        }
        logits = _target_logits(model, inner, alone)[0]
        whole = logits.new_zeros(labels.shape[1], logits.shape[-1])
        found.append(whole.masked_scatter(kept[:, None], logits))
    return torch.stack(found)


def _target_logits(model: Any, inner: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`target_logits` in one forward pass."""
    labels, inputs = batch["labels"], {"input_ids": batch["input_ids"]}
    settings: dict[str, Any] = {"use_cache": False} if accepts_argument(inner, "use_cache") else {}
    if accepts_argument(inner, "attention_mask"):
        inputs["attention_mask"] = batch["attention_mask"]
    if inner.config.is_encoder_decoder:
        return model(**inputs, decoder_input_ids=decoder_inputs(inner, labels), **settings).logits
    if "position_ids" in batch and accepts_argument(inner, "position_ids"):
        inputs["position_ids"] = batch["position_ids"]
    length, width = batch["input_ids"].shape[1], labels.shape[1]
    # `ends`: where each row's tokens end. Label i of a row is predicted one position before it stands.
    ends = length - batch["attention_mask"].flip(-1).argmax(-1, keepdim=True)
    positions = (ends - 1 - width + torch.arange(width, device=ends.device)).clamp(min=0)
    first = int(positions[labels != IGNORED].min())
    left = bool((ends == length).all())
    keep = width + 1 if left else length - first
    if accepts_argument(inner, "logits_to_keep"):
        settings["logits_to_keep"] = keep
    logits = model(**inputs, **settings).logits[:, -keep:]
    if left:
        return logits[:, :-1]
    positions = (positions - first).clamp(min=0).to(logits.device)
    return logits[torch.arange(len(positions), device=logits.device)[:, None], positions]


def _unwrap(model: Any) -> Any:
    """The transformers model inside torch.compile, data parallel and PEFT."""
    while not hasattr(model, "config"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    # A compiled module passes attributes through, but not its forward's signature.
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
