"""Answers that continue prefilled prompts: the logits after each of their tokens.

Any number of answers may continue one prompt. There are three ways to run them, and each costs something else:

    alone      Every answer is a row of a batch, with its own copy of its prompt's cache. Copies cost memory:
               (width of the prompts + longest answer) positions per row, however short the answer.
    packed     Several answers to one prompt are laid one behind the other in a row, after a single copy, and a mask
               hides them from each other. That saves copies, but every token of a row is compared with every other,
               so a row of n tokens costs n² comparisons of which most are masked: `MAX_PACKED_TOKENS` bounds that.
               Only for models that attend by a mask of ours.
    uncached   Every answer is run together with its prompt, which is read anew. For models whose cache can't be
               shared (recurrent layers, experts with a capacity), and for answers that reach beyond what can.

All of them yield batches in the same form, so that ranking and exact match don't depend on which way was taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.evaluation.batching import split_into_batches
from phatgoose.evaluation.prefill import (
    Prefill,
    can_prefill_in_parts,
    check_scorable_once,
    select_cache_rows,
)
from phatgoose.models.attach.attach import prompted, routing_of, select_encoded
from phatgoose.models.base.base import decoder_start, device_of
from phatgoose.models.text.batch import collate, target_logits
from phatgoose.models.text.capabilities import accepts_argument, supports_left_padding
from phatgoose.models.text.encoding import Encoded

MAX_PACKED_TOKENS = 256
"""Most tokens of one prompt's answers that are packed into one row."""

LogitBatch = tuple[list[int], Tensor, Tensor]
"""(which answers, logits [any, vocabulary], positions int64): `positions` says which rows of `logits` follow
each token of the first answer, then of the next, and so on."""


def continuations(
    prefill: Prefill, owners: Sequence[int], answers: Sequence[Sequence[int]]
) -> Iterator[LogitBatch]:
    """Runs all of `answers` (none empty), each after prompt `owners[i]` of `prefill`, which stays usable."""
    if prefill.cache is None:
        yield from uncached_continuations(prefill, owners, answers, after_prompt=False)
        return
    if not answers:
        return
    # A group is what shares a row: a pack, or a single answer.
    packing = _accepts_4d_mask(prefill.model)
    groups = _pack(owners, answers, _max_packed(prefill)) if packing else [[n] for n in range(len(answers))]
    sizes = [sum(len(answers[n]) for n in group) for group in groups]
    # Limits of a batch: its logits, and the positions of its copies of the cache together with the answers.
    limits = [(0, _max_logit_tokens(prefill)), (prefill.mask.shape[1], prefill.free_positions)]
    for batch in split_into_batches(sizes, limits, prefill.config.batch_rows):
        chosen = [groups[n] for n in batch]
        asked = [owners[group[0]] for group in chosen]
        if packing:
            logits = _extend_packed(prefill, asked, [[answers[n] for n in group] for group in chosen])
        else:
            logits = extend(prefill, asked, [answers[n] for (n,) in chosen])
        # The answers of a row follow each other without a gap, from its beginning.
        starts = [logits.shape[1] * row for row in range(len(batch))]
        numbers = [n for group in chosen for n in group]
        yield numbers, logits.flatten(0, 1), _ranges(starts, [sizes[n] for n in batch])


def uncached_continuations(
    prefill: Prefill, owners: Sequence[int], answers: Sequence[Sequence[int]], *, after_prompt: bool = True
) -> Iterator[LogitBatch]:
    """As `continuations`, but each answer is run together with its prompt, without a cache.

    Args:
        after_prompt: positions also hold, before each answer's, the row of logits that follows its prompt.
    """
    lengths = [len(prefill.prompts[o]) + len(a) + 1 for o, a in zip(owners, answers, strict=True)]
    for batch in split_into_batches(lengths, [(0, _max_logit_tokens(prefill))], prefill.config.batch_rows):
        new = [answers[n] for n in batch]
        logits = uncached_logits(prefill, [owners[n] for n in batch], new)[:, 0 if after_prompt else 1 :]
        starts = [logits.shape[1] * n for n in range(len(batch))]
        yield batch, logits.flatten(0, 1), _ranges(starts, [len(a) + after_prompt for a in new])


def uncached_logits(prefill: Prefill, owners: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """Logits [n, 1 + longest, vocabulary] after prompt `owners[i]`, and after each token of `answers[i]` behind it."""
    model, pad = prefill.model, prefill.pad
    check_scorable_once(model)
    seq2seq = bool(model.config.is_encoder_decoder)
    prompts = [prefill.prompts[owner] for owner in owners]
    # What follows an answer's last token is predicted at a token that is never read: the padding token.
    rows = [Encoded(p, (*a, pad)) for p, a in zip(prompts, answers, strict=True)]
    batch = collate(rows, pad, is_encoder_decoder=seq2seq, left=supports_left_padding(model))
    with prompted(model, prompts):
        logits = target_logits(model, {name: tensor.to(device_of(model)) for name, tensor in batch.items()})
    if seq2seq:
        return logits
    # Decoder-only targets end in the last column: move each row's logits to the front.
    width = logits.shape[1]
    starts = torch.tensor([width - len(row.target_ids) for row in rows])
    columns = (starts[:, None] + torch.arange(width)).clamp(max=width - 1).to(logits.device)
    return logits[torch.arange(len(rows), device=logits.device)[:, None], columns]


def extend(prefill: Prefill, owners: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """Logits [n, longest, vocabulary] after each token of `answers[i]`, which follows prompt `owners[i]`.

    Position j of row i predicts what follows answers[i][: j + 1]; positions beyond len(answers[i]) mean nothing.
    """
    model, device, width = prefill.model, device_of(prefill.model), max(len(a) for a in answers)
    ids = torch.tensor([list(a) + [prefill.pad] * (width - len(a)) for a in answers]).to(device)
    chosen = torch.tensor(owners)
    mask = prefill.mask[chosen.to(prefill.mask.device)]
    inputs: dict[str, Any] = {"past_key_values": select_cache_rows(prefill.cache, chosen), "use_cache": True}
    if prefill.encoder_output is not None:
        encoded = select_encoded(model, prefill.encoder_output, chosen)
        inputs["decoder_input_ids"], inputs["attention_mask"] = ids, mask
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
    else:
        # The padding at the right end is seen by no real token (attention is causal), so it needs no mask, but for a
        # router that sums over tokens.
        new = mask.new_ones(len(owners), width)
        if (routing := routing_of(model)) is not None and routing.router.remembers:
            new = (torch.arange(width) < torch.tensor([len(a) for a in answers])[:, None]).to(mask)
        inputs["input_ids"] = ids
        inputs["attention_mask"] = torch.cat([mask, new], dim=1)
        if accepts_argument(model, "position_ids"):
            # The padding repeats the last real position: a table of learnt positions may end right there.
            lengths = torch.tensor([len(a) for a in answers])
            offsets = torch.minimum(torch.arange(width), lengths[:, None] - 1)
            starts = torch.tensor([len(prefill.prompts[owner]) for owner in owners])
            inputs["position_ids"] = (starts[:, None] + offsets).to(device)
    # The cache of an encoder–decoder holds the decoder's start token.
    written = [] if prefill.encoder_output is None else [decoder_start(model)]
    with prompted(model, [prefill.prompts[owner] for owner in owners], [written] * len(owners)):
        return model(**inputs).logits


def _pack(owners: Sequence[int], answers: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Answers to the same prompt that share one copy of its cache: at most `most` tokens together, or a single
    answer."""
    packs: list[list[int]] = []
    last: dict[int, tuple[list[int], int]] = {}  # owner → its pack that may still grow, and the pack's tokens
    for number, (owner, answer) in enumerate(zip(owners, answers, strict=True)):
        pack, size = last.get(owner, ([], 0))
        if not pack or size + len(answer) > most:
            pack, size = [], 0
            packs.append(pack)
        pack.append(number)
        last[owner] = pack, size + len(answer)
    return packs


def _max_packed(prefill: Prefill) -> int:
    """Most tokens of a pack: a single row must keep within every limit of a batch, as packs can't be split later."""
    most = min(MAX_PACKED_TOKENS, _max_logit_tokens(prefill))
    return min(most, prefill.free_positions - prefill.mask.shape[1])


def _extend_packed(
    prefill: Prefill, owners: Sequence[int], packs: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """Logits [n, longest, vocabulary] after the answers of `packs[i]`, one after the other, after prompt `owners[i]`.

    Each answer sees its prompt and itself, by a mask. Its positions are counted from the end of its prompt, so that
    for the model it follows the prompt directly, whatever lies between them in the row. Routers aren't told which
    tokens are a prompt's: those that ask are never packed (`can_prefill_in_parts`).
    """
    model, width = prefill.model, max(sum(map(len, pack)) for pack in packs)
    ids, offsets = (
        torch.full((len(packs), width), prefill.pad),
        torch.zeros(len(packs), width, dtype=torch.int64),
    )
    # Which answer a position belongs to: each padding position is an answer of its own, so it sees only
    # itself and the prompt. (A position that saw nothing would make NaN, which spreads.)
    answer_of = torch.arange(width).repeat(len(packs), 1)
    for row, pack in enumerate(packs):
        start = 0
        for number, answer in enumerate(pack):
            end = start + len(answer)
            ids[row, start:end], offsets[row, start:end] = torch.tensor(answer), torch.arange(len(answer))
            answer_of[row, start:end] = width + number
            start = end
    same_answer = answer_of[:, :, None] == answer_of[:, None, :]
    own = same_answer & torch.ones(width, width, dtype=torch.bool).tril()
    chosen = torch.tensor(owners)
    visible = prefill.mask[chosen.to(prefill.mask.device)].bool()[:, None, :].expand(-1, width, -1)
    mask = torch.cat([visible, own.to(visible.device)], dim=2)[:, None].to(device_of(model))
    if model.config._attn_implementation == "eager":  # it adds the mask to the scores; sdpa takes booleans
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, lowest)
    lengths = torch.tensor([len(prefill.prompts[owner]) for owner in owners])
    logits: Tensor = model(
        input_ids=ids.to(device_of(model)),
        attention_mask=mask,
        position_ids=(lengths[:, None] + offsets).to(device_of(model)),
        past_key_values=select_cache_rows(prefill.cache, chosen),
        use_cache=True,
    ).logits
    return logits


def _accepts_4d_mask(model: PreTrainedModel) -> bool:
    """True if the model attends by a mask [rows, 1, queries, keys] as given, and a router may see the packed
    tokens together."""
    implementation = getattr(model.config, "_attn_implementation", None)
    return can_prefill_in_parts(model) and implementation in ("sdpa", "eager")


def _max_logit_tokens(prefill: Prefill) -> int:
    """Most tokens in one forward whose logits are all asked for."""
    model, config = prefill.model, prefill.config
    head: Any = model.get_output_embeddings()
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or head.weight.shape[0]
    return min(config.tokens_for(device_of(model)), max(1, config.logit_values // vocabulary))


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
