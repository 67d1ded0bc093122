"""The base with an expert writes: texts sampled in batches, and which of them can be rows of a task."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from phatgoose.errors import TrainingError
from phatgoose.models.base.base import Base, end_tokens
from phatgoose.models.text.batch import pad_id, pad_rows
from phatgoose.models.text.capabilities import generation_groups
from phatgoose.models.text.encoding import prompt_ids
from phatgoose.models.text.generate import answer_settings, use_generation_config
from phatgoose.records import Example
from phatgoose.training.config import WritingConfig
from phatgoose.training.trainer.preserve import preserved_random_state

Text = tuple[str, bool]
"""A text, and whether it was cut off."""


def write_batch(base: Base, config: WritingConfig, prompts: Sequence[str], number: int) -> list[Text]:
    """Batch `number`: its texts depend on nothing but the settings and this number."""
    model, tokenizer, size = base.model, base.tokenizer, config.rows_per_batch
    ends = end_tokens(base.model, base.tokenizer.eos_token_id)
    if prompts:
        texts = [prompts[(number * size + i) % len(prompts)] for i in range(size)]
        inputs = [list(prompt_ids(tokenizer, text, base.is_encoder_decoder)) for text in texts]
    else:
        inputs = [[_begin(base)]] * size
    settings = answer_settings(base, config.max_new_tokens, config.temperature)
    found: list[Text] = [("", False)] * size
    with preserved_random_state(), use_generation_config(model, settings), torch.no_grad():
        torch.manual_seed(
            int.from_bytes(hashlib.sha256(f"{config.seed}:{number}".encode()).digest()[:7], "big")
        )
        for part in generation_groups(model, inputs, config.max_new_tokens):
            answers = _sampled(base, [inputs[i] for i in part], settings)
            for i, tokens in zip(part, answers, strict=True):
                found[i] = _text(tokenizer, tokens, ends)
    return found


def _sampled(base: Base, inputs: Sequence[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """What is written behind each input."""
    left = not base.is_encoder_decoder
    ids, mask = pad_rows(inputs, pad_id(base.tokenizer), left=left)
    run: Any = base.model.generate
    try:
        out: Tensor = run(
            ids.to(base.device), attention_mask=mask.to(base.device), generation_config=settings
        )
    except RuntimeError as cause:
        if "probability tensor" not in str(cause):
            raise
        raise TrainingError(
            "the base with this expert computes logits that aren't finite, from which nothing can be sampled."
        ) from cause
    return out[:, ids.shape[1] if left else 1 :].tolist()


def _text(tokenizer: Any, tokens: list[int], ends: frozenset[int]) -> Text:
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    return tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), end is None


def usable_rows(
    batches: Sequence[Sequence[Text]], prompts: Sequence[str], config: WritingConfig
) -> tuple[list[Example], dict[str, int]]:
    """The usable rows, each once, and how many texts there were of each kind."""
    rows: dict[Example, None] = {}
    counts: Counter[str] = Counter()
    for place, (text, cut) in enumerate(text for batch in batches for text in batch):
        prompt, target = (prompts[place % len(prompts)], text) if prompts else _halves(text)
        if not text:
            kind = "empty"
        elif not prompt or not target:
            kind = "too_short"
        elif _circles(text.split()):
            kind = "circular"
        elif (row := Example(prompt, (target,))) in rows:
            kind = "repeated"
        else:
            rows[row] = None
            kind = "usable"
            counts["cut_off"] += cut
        counts[kind] += 1
    kinds = ("usable", "cut_off", "empty", "too_short", "circular", "repeated")
    written = sum(map(len, batches))
    return list(rows), {"written": written, **{kind: counts[kind] for kind in kinds}}


def _halves(text: str) -> tuple[str, str]:
    """The text cut at the space nearest to its middle, which encoding puts back; ("", "") if it has none inside."""
    spaces = [
        i
        for i in range(1, len(text) - 1)
        if text[i] == " " and not text[i - 1].isspace() and not text[i + 1].isspace()
    ]
    if not spaces:
        return "", ""
    middle = min(spaces, key=lambda i: abs(2 * i - len(text)))
    return text[:middle], text[middle + 1 :]


def _circles(words: Sequence[str]) -> bool:
    """Whether more than half of all runs of three words were there before."""
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(runs) > 5 and len(set(runs)) * 2 < len(runs)


def _begin(base: Base) -> int:
    tokenizer = base.tokenizer
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise TrainingError("the tokenizer has no token to begin a text with: give prompts.")
    return int(found)
