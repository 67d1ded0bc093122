"""Text → token ids: prompts, conversations and rows of tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from phatgoose.errors import PhatgooseError, TaskError
from phatgoose.experts.files.tokenizer_files import template_sha256
from phatgoose.models.base.base import Base
from phatgoose.models.text.conversation import conversation_answer_ids, conversation_ids
from phatgoose.records import SPLITS, Example, Task

UNLIMITED = 2**31
"""A token limit that no text reaches."""


@dataclass(frozen=True)
class Encoded:
    """One prompt with one answer, as token ids."""

    prompt_ids: tuple[int, ...]
    """Never empty. For an encoder–decoder: the encoder's input, with the end token that the tokenizer adds."""
    target_ids: tuple[int, ...]
    """The answer, then the end token."""
    cut: int = 0
    """Number of prompt tokens removed at the left to keep the length limit."""

    @property
    def truncated(self) -> bool:
        return self.cut > 0

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


def encode_answers(base: Base, example: Example, answers: Sequence[str], max_length: int) -> list[Encoded]:
    """One Encoded per answer (a target or a choice of the example), all with the same prompt_ids.

    These are truncated at the left to fit the longest answer, if necessary.

    Decoder-only: prompt and answer are joined by a space (by nothing if the prompt ends in white space) and encoded as
    one text. The target is what follows the prompt's own tokens. If the tokenizer merges across the border, so that the
    prompt's tokens are no prefix, the target is the encoding of space and answer alone. There is a BOS token only if
    the tokenizer adds one; it isn't doubled if the prompt's text begins with it, and truncation keeps it. An end token
    that the tokenizer appends to a prompt is removed.

    Encoder–decoder: the tokenizer encodes both sides as it does by default.

    Every target ends with exactly one end token. Conversations are encoded by `conversation_answer_ids`.

    Args:
        max_length: limit for prompt and target together; for encoder–decoders, for each of the two.

    Raises:
        TaskError: an answer leaves no room for a single prompt token, a text has no tokens, or there is no end token;
            or as `conversation_answer_ids` raises it.
    """
    if example.conversation is None:
        prompt, targets = _plain_ids(base, example.input, answers)
    else:
        messages, tools = example.messages()
        known = dict(zip(example.targets, example.answers, strict=True))
        turns = [json.loads(known[a]) if a in known else {"content": a} for a in answers]
        prompt, targets = conversation_answer_ids(base, messages, turns, tools)
    longest = max(len(target) for target in targets)
    room = max_length if base.is_encoder_decoder else max_length - longest
    if room < 1 or longest > max_length:
        raise TaskError(
            f"an answer of {longest} tokens leaves no room for its prompt in max_length={max_length}: "
            f"raise max_length or leave the row out (prompt {example.input[:60]!r}…)."
        )
    kept = _truncate_left(base.tokenizer, prompt, room)
    return [Encoded(tuple(kept), tuple(target), len(prompt) - len(kept)) for target in targets]


def encode_input(base: Base, example: Example) -> tuple[int, ...]:
    """The tokens of an example's prompt, not truncated. A TaskError as by `prompt_ids` and `conversation_ids`."""
    if example.conversation is None:
        return prompt_ids(base.tokenizer, example.input, base.is_encoder_decoder)
    return tuple(conversation_ids(base, *example.messages()))


def encode_prompt(base: Base, prompt: str) -> Tensor:
    """A plain prompt, encoded by `prompt_ids` as in training and evaluation: int64 [1, T]."""
    return torch.tensor([prompt_ids(base.tokenizer, prompt, base.is_encoder_decoder)])


def encode_chat(base: Base, messages: Sequence[dict[str, str]]) -> Tensor:
    """A conversation up to where the model answers, encoded by `conversation_ids`: int64 [1, T]."""
    if base.tokenizer.chat_template is None:
        raise PhatgooseError(f"the tokenizer of {base.spec} has no chat template: use --raw.")
    return torch.tensor([conversation_ids(base, messages)])


def chat_template_key(base: Base, task: Task) -> dict[str, str]:
    """{"chat_template": sha256} if the task has conversations, whose tokens depend on the template; else {}."""
    if not any(e.conversation is not None for split in SPLITS for e in task.split(split)):
        return {}
    template = base.tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return {"chat_template": template_sha256(text)}


def _plain_ids(base: Base, prompt: str, answers: Sequence[str]) -> tuple[Sequence[int], list[list[int]]]:
    """(the prompt's tokens, the tokens of each answer) of plain text."""
    tokenizer, seq2seq = base.tokenizer, base.is_encoder_decoder
    end, ids = _end_token(tokenizer), prompt_ids(tokenizer, prompt, seq2seq)
    if seq2seq:
        targets = [_decoder_target(tokenizer, answer, end) for answer in answers]
    else:
        appends_end = _appends_end(tokenizer)
        targets = [_continuation(tokenizer, prompt, ids, answer, appends_end) for answer in answers]
    for answer, target in zip(answers, targets, strict=True):
        if not target:
            raise TaskError(f"the answer {answer!r} has no tokens.")
    return ids, [[*target, end] for target in targets]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, is_encoder_decoder: bool) -> tuple[int, ...]:
    """The prompt's tokens as `encode_answers` encodes them, not truncated. A TaskError if there are none."""
    end = _end_token(tokenizer)
    ids = _encode(tokenizer, prompt)
    if not is_encoder_decoder and _appends_end(tokenizer):
        ids = _without_end(ids, end)
    if not ids:
        raise TaskError(f"the prompt {prompt!r} has no tokens.")
    return tuple(ids)


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False) -> str:
    """Token ids → text, without cleaning up spaces. `special`: whether special tokens are in it."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    )


def _truncate_left(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], room: int) -> Sequence[int]:
    if len(ids) <= room:
        return ids
    begin = tokenizer.bos_token_id
    if begin is not None and ids[0] == begin and room > 1:
        return [begin, *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise TaskError(
            "the tokenizer has no end-of-sequence token, which closes every answer: set tokenizer.eos_token."
        )
    return int(end)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    # verbose=False: our max_length replaces the tokenizer's model_max_length, so its warning doesn't apply.
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    begin = tokenizer.bos_token_id
    if special and begin is not None and ids[:2] == [begin, begin]:
        # A text rendered by a chat template already begins with the BOS token that the tokenizer adds.
        own = _encode(tokenizer, text, special=False)
        return ids[1:] if ids[1 : 1 + len(own)] == own else ids
    return ids


def _decoder_target(tokenizer: PreTrainedTokenizerBase, answer: str, end: int) -> list[int]:
    """The answer in the vocabulary and language of targets (Marian, NLLB), without what the tokenizer puts after it.

    That is the end token; for mBART also the language code, which its decoder starts from.
    """
    whole = list(tokenizer(text_target=answer, verbose=False)["input_ids"])
    bare = list(tokenizer(text_target=answer, add_special_tokens=False, verbose=False)["input_ids"])
    for first in range(len(whole) - len(bare) + 1):
        if bare and whole[first : first + len(bare)] == bare:
            return _without_end(whole[: first + len(bare)], end)
    return _without_end(whole, end)


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, ids: tuple[int, ...], answer: str, appends_end: bool
) -> list[int]:
    """The answer's tokens after a decoder-only prompt with these ids."""
    text = answer if prompt[-1:].isspace() else f" {answer}"
    whole = _encode(tokenizer, prompt + text)
    if appends_end:
        whole = _without_end(whole, tokenizer.eos_token_id)
    if tuple(whole[: len(ids)]) == ids and len(whole) > len(ids):
        return whole[len(ids) :]
    return _encode(tokenizer, text, special=False)


def _appends_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    probe = _encode(tokenizer, "a")
    bare = _encode(tokenizer, "a", special=False)
    return probe[-1:] == [tokenizer.eos_token_id] and bare[-1:] != probe[-1:]


def _without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else ids
