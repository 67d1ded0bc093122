"""Rows of tasks → token ids: plain prompts as `tasks.batch` has them, conversations through the base's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence

from phatgoose.experts.files.tokenizer_files import sha256_of
from phatgoose.models.base.base import Base
from phatgoose.models.text.batch import Encoded, encode_choices, fitted, prompt_ids
from phatgoose.models.text.conversation import answered, conversation_ids
from phatgoose.records import SPLITS, Example, Task


def encode_answers(base: Base, example: Example, answers: Sequence[str], max_length: int) -> list[Encoded]:
    """One Encoded for each answer (a target or choice of the example's), all with the same prompt.

    Raises:
        TaskError: as `encode_choices`, or as `answered`.
    """
    kind = {"is_encoder_decoder": base.is_encoder_decoder}
    if example.conversation is None:
        return encode_choices(base.tokenizer, example.input, answers, max_length=max_length, **kind)
    messages, tools = example.messages()
    known = dict(zip(example.targets, example.answers, strict=True))
    turns = [json.loads(known[a]) if a in known else {"content": a} for a in answers]
    prompt, targets = answered(base, messages, turns, tools)
    return fitted(base.tokenizer, prompt, targets, max_length=max_length, shown=example.input, **kind)


def template_of(base: Base, task: Task) -> dict[str, str]:
    """What results on a task depend on beside its rows: {"chat_template": sha256} where rows are conversations, else {}."""
    if not any(e.conversation is not None for split in SPLITS for e in task.split(split)):
        return {}
    template = base.tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return {"chat_template": sha256_of(text)}


def encode_input(base: Base, example: Example) -> tuple[int, ...]:
    """The tokens of an example's prompt, uncut.

    Raises:
        TaskError: it has none, or as `conversation_ids`.
    """
    if example.conversation is None:
        return prompt_ids(base.tokenizer, example.input, base.is_encoder_decoder)
    return tuple(conversation_ids(base, *example.messages()))
