"""Prompts read once, then continued by several answers each: the engine under ranking and under exact match.

`read` runs the prompts (left-padded, logits of the last position only) and keeps the key-value cache. `continuations` lays any
number of answers behind them: `extend` copies the cache's rows, one for each answer, and runs all answers in one forward
(right-padded); where the model attends by a mask of ours, a prompt's answers lie behind one copy, hidden from each other. In an
encoder–decoder the encoder reads the prompt (right-padded), and the decoder's start token with the cross-attention's keys and values is
what is kept. Where no cache can be shared (recurrent layers, experts with a capacity), every answer is read with its prompt (`plain.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.plain import check_once, plain_logits
from phatgoose.models.base.base import decoder_start, device_of
from phatgoose.models.context.prompted import ATTRIBUTE, prompted
from phatgoose.models.text.batch import pad_rows
from phatgoose.models.text.capabilities import (
    accepts_argument,
    has_cache_layers,
    is_plain_cache,
    max_mixed_length,
    may_attend_ahead,
    supports_shared_cache,
)
from phatgoose.models.text.encoding import UNLIMITED

OVERHEAD = 64
"""What one more forward costs beside its tokens, in tokens: measured for a model of 135M parameters on a CPU."""

BUNDLE = 256
"""Most tokens of one prompt's answers that go in one row: they look at each other in vain, in exchange for one cache."""


@dataclass(frozen=True)
class Row:
    """One example as tokens. Each answer ends in the end token; `truncated` if the prompt was cut to fit."""

    index: int
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    truncated: bool = False


@dataclass(frozen=True)
class Read:
    """Prompts that were read. logits: [rows, vocabulary], the next token's, in the model's dtype.

    Both logits and cache are None where no cache can be gone on with: then prompts are read with what follows them (`anew`).
    """

    logits: Tensor | None
    cache: Any
    mask: Tensor
    prompts: tuple[tuple[int, ...], ...]
    encoded: Tensor | None = None
    held: int = 0
    """Positions (rows × width) of the caches that this one was made of, which live as long."""

    def room(self, config: EvaluationConfig) -> int:
        """Positions that may still be kept beside it."""
        return config.cache_tokens - self.held - self.mask.numel()


def read(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> Read:
    """Runs `prompts` (none empty) once and keeps their cache, if what follows may go on from it.

    Raises:
        EvaluationError: if the model's scores mean nothing (`check_once`).
    """
    if may_attend_ahead(model):
        check_once(model)
    whole, seq2seq = tuple(map(tuple, prompts)), bool(model.config.is_encoder_decoder)
    ids, mask = (tensor.to(device_of(model)) for tensor in pad_rows(prompts, pad, left=not seq2seq))
    if supports_shared_cache(model) and (seq2seq or ids.shape[1] <= max_mixed_length(model)):
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        if seq2seq:
            inputs["decoder_input_ids"] = torch.full(
                (len(prompts), 1), decoder_start(model), device=ids.device
            )
        elif accepts_argument(model, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if accepts_argument(model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        out = model(**inputs)
        kept = getattr(out, "past_key_values", None)
        if is_plain_cache(kept):
            encoded = out.encoder_last_hidden_state if seq2seq else None
            return Read(out.logits[:, -1], kept, mask, whole, encoded)
    return Read(None, None, mask, whole)


def extend(
    model: PreTrainedModel, before: Read, rows: Sequence[int], tokens: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Logits [n, longest, vocabulary] after each of `tokens[i]`, put behind prompt `rows[i]`; `before` stays usable.

    Position j of row i predicts what follows tokens[i][: j + 1]; beyond len(tokens[i]) it means nothing.
    """
    device, width = device_of(model), max(len(t) for t in tokens)
    lengths = torch.tensor([len(t) for t in tokens])
    ids = torch.tensor([list(t) + [pad] * (width - len(t)) for t in tokens])
    chosen = torch.tensor(rows)
    mask = before.mask[chosen.to(before.mask.device)]
    inputs: dict[str, Any] = {"past_key_values": select(before.cache, chosen), "use_cache": True}
    if before.encoded is not None:
        inputs |= {
            "decoder_input_ids": ids.to(device),
            "encoder_outputs": BaseModelOutput(
                last_hidden_state=before.encoded[chosen.to(before.encoded.device)]
            ),
            "attention_mask": mask,
        }
    else:
        # What pads the right end is seen by no real token (attention is causal), so it needs no mask.
        inputs |= {
            "input_ids": ids.to(device),
            "attention_mask": torch.cat([mask, mask.new_ones(len(rows), width)], dim=1),
        }
        if accepts_argument(model, "position_ids"):
            # The padding repeats the last real position: a table of learnt positions may end right there.
            offsets = torch.minimum(torch.arange(width), lengths[:, None] - 1)
            starts = torch.tensor([len(before.prompts[row]) for row in rows])
            inputs["position_ids"] = (starts[:, None] + offsets).to(device)
    # An encoder–decoder's cache holds the decoder's start token.
    start = [] if before.encoded is None else [decoder_start(model)]
    with prompted(model, [before.prompts[row] for row in rows], [start] * len(rows)):
        return model(**inputs).logits


def groups(
    lengths: Sequence[int], limits: Sequence[tuple[int, int]], rows: int, overhead: int = OVERHEAD
) -> list[list[int]]:
    """Splits items into forwards, longest first, so that little is spent on padding and on one more forward.

    `limits` holds (extra, most) pairs: n items padded to length L need n·(L + extra) <= most; a single item may exceed
    it, since it can't be split. At most `rows` items go together. `overhead` is what a forward costs beside its tokens,
    in tokens.
    """
    sizes = np.asarray(lengths)
    order = np.argsort(-sizes, kind="stable")
    sizes = sizes[order]
    found, start = [], 0
    while start < len(order):
        longest = int(sizes[start])
        room = min(
            [rows, *(most // (longest + extra) if longest + extra else rows for extra, most in limits)]
        )
        end = min(len(order), start + max(1, room))
        saved = (longest - sizes[start + 1 : end]) * np.arange(end - start - 1, 0, -1)
        if saved.size and saved.max() > overhead:
            end = start + 1 + int(saved.argmax())
        found.append(order[start:end].tolist())
        start = end
    return found


def continuations(
    model: PreTrainedModel,
    before: Read,
    rows: Sequence[int],
    tokens: Sequence[Sequence[int]],
    pad: int,
    config: EvaluationConfig,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Runs all of `tokens` (none empty), each behind prompt `rows[i]`, in batches: (which ones, logits, places).

    logits: [any, vocabulary]; places int64: whose rows follow each token of the first one, then of the next, and so on.
    """
    if before.cache is None:
        yield from anew(model, [before.prompts[row] for row in rows], tokens, pad, config, first=False)
    elif tokens:
        yield from _behind(model, before, rows, tokens, pad, config)


def anew(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    pad: int,
    config: EvaluationConfig,
    *,
    first: bool = True,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """As `continuations`, but each of `tokens` is read with its prompt, without a cache; `first`: also what follows the prompt.

    Raises:
        EvaluationError: if the model's scores mean nothing (`plain.py`).
    """
    lengths = [len(p) + len(t) + 1 for p, t in zip(prompts, tokens, strict=True)]
    for part in groups(lengths, [(0, _most(model, config))], config.batch_rows):
        new = [tokens[n] for n in part]
        logits = plain_logits(model, [prompts[n] for n in part], new, pad)[:, 0 if first else 1 :]
        starts = [logits.shape[1] * n for n in range(len(part))]
        yield part, logits.flatten(0, 1), _ranges(starts, [len(t) + first for t in new])


def _most(model: PreTrainedModel, config: EvaluationConfig) -> int:
    """Most tokens in one forward whose logits are all asked for."""
    head: Any = model.get_output_embeddings()
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or head.weight.shape[0]
    return min(config.tokens_for(device_of(model)), max(1, config.logit_values // vocabulary))


def reach(model: PreTrainedModel, before: Read) -> int:
    """Length of prompt and answer up to which going on from the cache is what reading both anew is."""
    if before.cache is None:
        return 0
    return UNLIMITED if before.encoded is not None else max_mixed_length(model)


def _behind(
    model: PreTrainedModel,
    before: Read,
    rows: Sequence[int],
    tokens: Sequence[Sequence[int]],
    pad: int,
    config: EvaluationConfig,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """As `continuations`, all from the cache."""
    most = _most(model, config)
    limits = [(0, most), (before.mask.shape[1], before.room(config))]
    if not _takes_own_mask(model):
        for part in groups([len(t) for t in tokens], limits, config.batch_rows):
            logits = extend(model, before, [rows[n] for n in part], [tokens[n] for n in part], pad)
            starts = [logits.shape[1] * n for n in range(len(part))]
            yield part, logits.flatten(0, 1), _ranges(starts, [len(tokens[n]) for n in part])
        return
    bundles = _bundles(rows, tokens, min(BUNDLE, most, before.room(config) - before.mask.shape[1]))
    for chosen in groups([sum(len(tokens[n]) for n in b) for b in bundles], limits, config.batch_rows):
        found = [bundles[n] for n in chosen]
        logits = _extend_together(
            model, before, [rows[b[0]] for b in found], [[tokens[n] for n in b] for b in found], pad
        )
        starts, part = [], []
        for place, bundle in enumerate(found):
            lengths = [len(tokens[n]) for n in bundle]
            starts += [logits.shape[1] * place + sum(lengths[:n]) for n in range(len(bundle))]
            part += bundle
        yield part, logits.flatten(0, 1), _ranges(starts, [len(tokens[n]) for n in part])


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])


def _bundles(rows: Sequence[int], tokens: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Continuations of the same prompt that share one copy of its cache: at most `most` tokens, or a single one."""
    found: list[list[int]] = []
    last: dict[int, tuple[list[int], int]] = {}
    for place, (row, new) in enumerate(zip(rows, tokens, strict=True)):
        bundle, size = last.get(row, ([], 0))
        if not bundle or size + len(new) > most:
            bundle, size = [], 0
            found.append(bundle)
        bundle.append(place)
        last[row] = bundle, size + len(new)
    return found


def _extend_together(
    model: PreTrainedModel,
    before: Read,
    rows: Sequence[int],
    bundles: Sequence[Sequence[Sequence[int]]],
    pad: int,
) -> Tensor:
    """Logits [n, longest, vocabulary] after the continuations bundles[i], one after the other, of prompt `rows[i]`.

    Each sees the prompt and itself, by a mask, so the prompt's cache is copied once for all of them.
    """
    width = max(sum(len(t) for t in bundle) for bundle in bundles)
    ids, offsets = torch.full((len(bundles), width), pad), torch.zeros(len(bundles), width, dtype=torch.int64)
    owner = torch.arange(width).repeat(len(bundles), 1)  # padding is of its own
    for n, bundle in enumerate(bundles):
        start = 0
        for part, new in enumerate(bundle):
            end = start + len(new)
            ids[n, start:end], offsets[n, start:end] = torch.tensor(new), torch.arange(len(new))
            owner[n, start:end] = width + part
            start = end
    own = (owner[:, :, None] == owner[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril()
    chosen = torch.tensor(rows)
    seen = before.mask[chosen.to(before.mask.device)].bool()[:, None, :].expand(-1, width, -1)
    seen = torch.cat([seen, own.to(seen.device)], dim=2)[:, None]
    mask = seen.to(device_of(model))
    if model.config._attn_implementation == "eager":  # adds it; the other takes it as it is
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(model.dtype).min
        )
    lengths = torch.tensor([len(before.prompts[row]) for row in rows])
    found: Tensor = model(
        input_ids=ids.to(device_of(model)),
        attention_mask=mask,
        position_ids=(lengths[:, None] + offsets).to(device_of(model)),
        past_key_values=select(before.cache, chosen),
        use_cache=True,
    ).logits
    return found


def _takes_own_mask(model: PreTrainedModel) -> bool:
    """Whether the model attends by a mask [rows, 1, queries, keys] of ours as it stands, to keys that a router may see together."""
    return reads_on(model) and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")


def reads_on(model: PreTrainedModel) -> bool:
    """Whether a prompt may be read in two goes, the first one shared with others, and beside what it doesn't see.

    Not in an encoder–decoder, whose encoder looks ahead; where positions or windows are counted by places in the cache, not by what
    they hold; where the rotation of early tokens depends on how many follow; with caches that keep less than every position; for a
    router that looks at more than a token; while a trace counts tokens, which would miss the shared ones.
    """
    config = model.config
    if config.is_encoder_decoder or getattr(config, "alibi", False) or config.model_type == "gpt_neo":
        return False
    if not (accepts_argument(model, "position_ids") and accepts_argument(model, "logits_to_keep")):
        return False
    if max_mixed_length(model) < UNLIMITED:
        return False
    routing = model.__dict__.get(ATTRIBUTE)
    if routing is not None and (routing.recorder is not None or not routing.router.by_token):
        return False
    return has_cache_layers(model, (DynamicLayer,))


def select(kept: Any, rows: Tensor) -> Any:
    """A cache that holds rows `rows` (int64, on the CPU: that indexes layers on any device) of `kept`, left as it is."""
    if isinstance(kept, EncoderDecoderCache):
        parts = select(kept.self_attention_cache, rows), select(kept.cross_attention_cache, rows)
        return EncoderDecoderCache(*parts)
    # These layers replace their tensors and never write into them, so copies of the layers may share them.
    new = copy.copy(kept)
    new.layers = [copy.copy(layer) for layer in kept.layers]
    new.batch_select_indices(rows)
    return new
