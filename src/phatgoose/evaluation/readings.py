"""Any number of prompts, read in batches, and what many of them begin with once (`prefixes.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import OVERHEAD, Read, groups, read, reads_on, select
from phatgoose.evaluation.prefixes import Prefix, prefixes
from phatgoose.models.base.base import device_of
from phatgoose.models.text.batch import pad_rows


def readings(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int, config: EvaluationConfig
) -> Iterator[tuple[list[int], Read]]:
    """Reads `prompts` (none empty) in batches: the places of some, and them as `read` reads them; each once.

    Let go of a Read before asking for the next: then caches hold no more than `config.cache_tokens` in all, or a row of each level.

    Raises:
        EvaluationError: as `read`.
    """
    whole = tuple(tuple(p) for p in prompts)
    root = prefixes(whole, OVERHEAD) if reads_on(model) else Prefix(0, list(range(len(whole))))
    return _readings(model, None, [(0, root)], whole, pad, config)


def _readings(
    model: PreTrainedModel,
    before: Read | None,
    nodes: Sequence[tuple[int, Prefix]],
    prompts: Sequence[tuple[int, ...]],
    pad: int,
    config: EvaluationConfig,
) -> Iterator[tuple[list[int], Read]]:
    """What hangs on `nodes`: beginnings, each with the row of `before` that has read it."""
    limits = [(0, config.tokens_for(device_of(model)))]
    if before is not None:
        limits.append((before.mask.shape[1], before.room(config) // 2))  # the rest is for what comes behind

    def batches(found: Sequence[tuple[int, tuple[int, ...]]]) -> list[list[int]]:
        done = [0 if before is None else len(before.prompts[owner]) for owner, _ in found]
        left = [len(tokens) - n for n, (_, tokens) in zip(done, found, strict=True)]
        return groups(left, limits, config.batch_rows)

    def run(found: Sequence[tuple[int, tuple[int, ...]]]) -> Read:
        owners, tokens = [owner for owner, _ in found], [tokens for _, tokens in found]
        return read(model, tokens, pad) if before is None else _read_on(model, before, owners, tokens, pad)

    # Nothing here keeps what was read while the next is.
    rows = [(owner, row) for owner, node in nodes for row in node.rows]
    wanted = [(owner, prompts[row]) for owner, row in rows]
    for part in batches(wanted):
        yield [rows[n][1] for n in part], run([wanted[n] for n in part])
    parts = [(owner, part) for owner, node in nodes for part in node.parts]
    wanted = [(owner, prompts[p.first()][: p.length]) for owner, p in parts]
    for part in batches(wanted):
        under = [(n, parts[p][1]) for n, p in enumerate(part)]
        yield from _readings(model, run([wanted[n] for n in part]), under, prompts, pad, config)


def _read_on(
    model: PreTrainedModel, before: Read, owners: Sequence[int], prompts: Sequence[tuple[int, ...]], pad: int
) -> Read:
    """Reads what each prompt has beyond the row of `before` that it begins with; in the result it is as if read in one."""
    rests = [p[len(before.prompts[owner]) :] for owner, p in zip(owners, prompts, strict=True)]
    ids, new = (tensor.to(device_of(model)) for tensor in pad_rows(rests, pad, left=True))
    chosen = torch.tensor(owners)
    mask = torch.cat([before.mask[chosen.to(before.mask.device)], new], dim=1)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
        past_key_values=select(before.cache, chosen),
        use_cache=True,
        logits_to_keep=1,
    )
    held = before.held + before.mask.numel()
    return Read(out.logits[:, -1], *_packed(out.past_key_values, mask), tuple(prompts), held=held)


def _packed(kept: Any, mask: Tensor) -> tuple[Any, Tensor]:
    """A cache and its mask [rows, positions] with each row's padding at the left: between what was read at two times, too."""
    width = int(mask.sum(-1).max())
    if width == mask.shape[1] and bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return kept, mask
    real = mask.argsort(dim=-1, stable=True)[:, -width:]
    for layer in kept.layers:
        places = real.to(layer.keys.device)[:, None, :, None]
        layer.keys, layer.values = (
            x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3])) for x in (layer.keys, layer.values)
        )
    return kept, mask.gather(1, real)
