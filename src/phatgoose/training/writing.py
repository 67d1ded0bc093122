"""Sample texts from the base with an expert, and select those that can be rows of a task."""

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
"""(a text, whether it was cut off)."""


def write_batch(base: Base, config: WritingConfig, prompts: Sequence[str], number: int) -> list[Text]:
    """Writes batch `number`. Its texts depend only on the settings and this number."""
    model, tokenizer, size = base.model, base.tokenizer, config.rows_per_batch
    ends = end_tokens(base.model, base.tokenizer.eos_token_id)
    if prompts:
        texts = [prompts[(number * size + i) % len(prompts)] for i in range(size)]
        inputs = [list(prompt_ids(tokenizer, text, base.is_encoder_decoder)) for text in texts]
    else:
        inputs = [[_first_token(base)]] * size
    settings = answer_settings(base, config.max_new_tokens, config.temperature)
    found: list[Text] = [("", False)] * size
    with preserved_random_state(), use_generation_config(model, settings), torch.no_grad():
        torch.manual_seed(
            int.from_bytes(hashlib.sha256(f"{config.seed}:{number}".encode()).digest()[:7], "big")
        )
        for part in generation_groups(model, inputs, config.max_new_tokens):
            answers = _sample(base, [inputs[i] for i in part], settings)
            for i, tokens in zip(part, answers, strict=True):
                found[i] = _text(tokenizer, tokens, ends)
    return found


def _sample(base: Base, inputs: Sequence[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """The tokens written after each input."""
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
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), end is None


def usable_rows(
    batches: Sequence[Sequence[Text]], prompts: Sequence[str], config: WritingConfig
) -> tuple[list[Example], dict[str, int]]:
    """(the usable rows without duplicates, the number of texts of each kind)."""
    rows: dict[Example, None] = {}
    counts: Counter[str] = Counter()
    for i, (text, cut) in enumerate(text for batch in batches for text in batch):
        prompt, target = (prompts[i % len(prompts)], text) if prompts else _split_in_half(text)
        if not text:
            kind = "empty"
        elif not prompt or not target:
            kind = "too_short"
        elif _repeats_itself(text.split()):
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


def _split_in_half(text: str) -> tuple[str, str]:
    """The text split at the space nearest to its middle, which encoding adds again; ("", "") if it has none inside."""
    spaces = [
        i
        for i in range(1, len(text) - 1)
        if text[i] == " " and not text[i - 1].isspace() and not text[i + 1].isspace()
    ]
    if not spaces:
        return "", ""
    middle = min(spaces, key=lambda i: abs(2 * i - len(text)))
    return text[:middle], text[middle + 1 :]


def _repeats_itself(words: Sequence[str]) -> bool:
    """True if more than half of all runs of three words occurred before."""
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(runs) > 5 and len(set(runs)) * 2 < len(runs)


def _first_token(base: Base) -> int:
    tokenizer = base.tokenizer
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise TrainingError("the tokenizer has no token to begin a text with: give prompts.")
    return int(found)
