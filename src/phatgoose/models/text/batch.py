"""Examples → tensors, the same for training and for scoring.

Decoder-only batches are padded on the left where the model allows it (`models/text/sequences.py`): then every target ends in the last
column, and the logits of the last L+1 positions are those that predict the targets. Other batches are padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from phatgoose.errors import TaskError

UNLIMITED = 2**31
"""A limit on tokens that no text reaches."""
IGNORED = -100
"""Label of a position that is no target."""


@dataclass(frozen=True)
class Encoded:
    """One prompt with one answer, as token ids."""

    prompt_ids: tuple[int, ...]
    """Never empty. Encoder–decoder: the encoder's input with the end token the tokenizer adds."""
    target_ids: tuple[int, ...]
    """The answer, then the end token."""
    cut: int = 0
    """How many prompt tokens were cut off at the left to keep to the length limit."""

    @property
    def truncated(self) -> bool:
        return self.cut > 0

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, is_encoder_decoder: bool, max_length: int
) -> Encoded:
    """`encode_choices` for one answer."""
    return encode_choices(
        tokenizer, prompt, [answer], is_encoder_decoder=is_encoder_decoder, max_length=max_length
    )[0]


def encode_choices(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answers: Sequence[str],
    *,
    is_encoder_decoder: bool,
    max_length: int,
) -> list[Encoded]:
    """One Encoded for each answer, all with the same prompt_ids (cut for the longest answer, if at all).

    Decoder-only: prompt and answer are joined by a space (by nothing where the prompt ends in white space) and encoded as
    one text; what follows the prompt's own tokens is the target. Where the tokenizer joins the two (the prompt's tokens are
    no prefix) the target is the encoding of space and answer alone. A BOS token stands only where the tokenizer puts one, is
    not doubled where the prompt's text begins with it, and survives a cut; an end token that the tokenizer appends to a
    prompt is taken off. Encoder–decoder: both sides as the tokenizer encodes them. The end token
    closes every target exactly once.

    Args:
        max_length: decoder-only: of prompt and target together; encoder–decoder: of each of the two sequences.

    Raises:
        TaskError: an answer leaves no room for a single prompt token, a text has no tokens, there is no end token.
    """
    end = _end_token(tokenizer)
    prompt_ids = _encode(tokenizer, prompt)
    if is_encoder_decoder:
        targets = [_target(tokenizer, answer, end) for answer in answers]
    else:
        appended = _appends_end(tokenizer)
        prompt_ids = _without_end(prompt_ids, end, appended)
        targets = [_continuation(tokenizer, prompt, prompt_ids, answer, appended) for answer in answers]
    for answer, target in zip(answers, targets, strict=True):
        if not target:
            raise TaskError(f"the answer {answer!r} has no tokens.")
    if not prompt_ids:
        raise TaskError(f"the prompt {prompt!r} has no tokens.")
    targets = [[*target, end] for target in targets]
    kind = {"is_encoder_decoder": is_encoder_decoder}
    return fitted(tokenizer, prompt_ids, targets, max_length=max_length, shown=prompt, **kind)


def fitted(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    targets: Sequence[list[int]],
    *,
    is_encoder_decoder: bool,
    max_length: int,
    shown: str,
) -> list[Encoded]:
    """One Encoded for each target, the prompt cut from the left for the longest of them, if at all.

    Args:
        targets: with their end tokens.
        shown: the prompt as text, for the error.

    Raises:
        TaskError: a target leaves no room for a single prompt token.
    """
    longest = max(len(t) for t in targets)
    room = max_length if is_encoder_decoder else max_length - longest
    if room < 1 or longest > max_length:
        raise TaskError(
            f"an answer of {longest} tokens leaves no room for its prompt in max_length={max_length}: "
            f"raise max_length or leave the row out (prompt {shown[:60]!r}…)."
        )
    kept = _cut_left(tokenizer, prompt_ids, room)
    cut = len(prompt_ids) - len(kept)
    return [Encoded(tuple(kept), tuple(target), cut) for target in targets]


def gap(prompt: str) -> str:
    """What stands between a decoder-only model's prompt and its answer: a space, or nothing behind white space."""
    return "" if prompt[-1:].isspace() else " "


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, is_encoder_decoder: bool) -> tuple[int, ...]:
    """A prompt's own tokens as `encode_pair` has them, uncut.

    Raises:
        TaskError: it has none, or the tokenizer no end token.
    """
    end = _end_token(tokenizer)
    ids = _encode(tokenizer, prompt)
    if not is_encoder_decoder:
        ids = _without_end(ids, end, _appends_end(tokenizer))
    if not ids:
        raise TaskError(f"the prompt {prompt!r} has no tokens.")
    return tuple(ids)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise TaskError(
            "the tokenizer has no end-of-sequence token, which closes every answer: set tokenizer.eos_token."
        )
    return int(end)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Token ids → text, without special tokens, and spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def collate(
    encoded: Sequence[Encoded], pad_id: int, *, is_encoder_decoder: bool, left: bool = True
) -> dict[str, Tensor]:
    """Tensors of one batch, all int64. B rows; L is the longest target.

    Decoder-only: `input_ids`, `attention_mask` [B, T], padded on the left with `position_ids`, or without `left` on the right (T:
    longest prompt + target), and `labels` [B, L]: the targets alone, ending in the last column, -100 before. Encoder–decoder:
    `input_ids`, `attention_mask` [B, S] and `labels` [B, L], padded on the right.
    """
    if is_encoder_decoder:
        input_ids, mask = padded([e.prompt_ids for e in encoded], pad_id, left=False)
        labels = _pad([e.target_ids for e in encoded], IGNORED, left=False)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    input_ids, mask = padded([e.prompt_ids + e.target_ids for e in encoded], pad_id, left=left)
    labels = _pad([e.target_ids for e in encoded], IGNORED, left=True)
    found = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {**found, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left else found


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [rows, longest], padded on the left or on the right."""
    return _pad(rows, pad_id, left=left), _pad([(1,) * len(row) for row in rows], 0, left=left)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end token where there is none (padding is masked: which id it is doesn't matter)."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise TaskError("the tokenizer has neither a padding nor an end token.")
    return int(found)


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over target tokens, a float32 scalar, computed in float32.

    Args:
        logits: [B, L, V], any float dtype; position i predicts labels[:, i].
        labels: [B, L] int64, -100 where there is no target. At least one must be there, or the mean is NaN.
    """
    chosen = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen])


def length_batches(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices into `lengths` in batches of similar length, the longest first: out of memory shows at once, not at the end.

    A batch has at most `max_rows` rows and, padded to its longest, at most `max_tokens` tokens (a single longer row is
    a batch of its own). Every index comes exactly once; equal lengths keep their order.
    """
    if max_rows < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"max_rows and max_tokens must be at least 1, got {max_rows} and {max_tokens}")
    batch: list[int] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if len(batch) >= rows and batch:
            yield batch
            batch = []
        if not batch:
            rows = (
                max_rows
                if max_tokens is None
                else max(1, min(max_rows, max_tokens // max(1, lengths[index])))
            )
        batch.append(index)
    if batch:
        yield batch


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    # verbose=False: the tokenizer's warning about its own model_max_length is our max_length's business.
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    begin = tokenizer.bos_token_id
    if special and begin is not None and ids[:2] == [begin, begin]:
        # A text that was rendered by a chat template brings the BOS token that the tokenizer puts before every text.
        own = _encode(tokenizer, text, special=False)
        return ids[1:] if ids[1 : 1 + len(own)] == own else ids
    return ids


def _target(tokenizer: PreTrainedTokenizerBase, answer: str, end: int) -> list[int]:
    """An answer as an encoder–decoder writes it: in the vocabulary and with the language of targets (Marian, NLLB), without what the
    tokenizer puts behind it (the end token; mBART's language, which its decoder starts from)."""
    whole = list(tokenizer(text_target=answer, verbose=False)["input_ids"])
    bare = list(tokenizer(text_target=answer, add_special_tokens=False, verbose=False)["input_ids"])
    for first in range(len(whole) - len(bare) + 1):
        if bare and whole[first : first + len(bare)] == bare:
            return _without_end(whole[: first + len(bare)], end, True)
    return _without_end(whole, end, True)


def _appends_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    probe = _encode(tokenizer, "a")
    return (
        probe[-1:] == [tokenizer.eos_token_id] and _encode(tokenizer, "a", special=False)[-1:] != probe[-1:]
    )


def _without_end(ids: list[int], end: int, appended: bool) -> list[int]:
    return ids[:-1] if appended and ids[-1:] == [end] else ids


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], answer: str, appended: bool
) -> list[int]:
    text = gap(prompt) + answer
    whole = _without_end(_encode(tokenizer, prompt + text), tokenizer.eos_token_id, appended)
    if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
        return whole[len(prompt_ids) :]
    return _encode(tokenizer, text, special=False)


def _cut_left(tokenizer: PreTrainedTokenizerBase, ids: list[int], room: int) -> list[int]:
    if len(ids) <= room:
        return ids
    begin = tokenizer.bos_token_id
    if begin is not None and ids[0] == begin and room > 1:
        return [begin, *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


def _pad(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    fill = [(value,) * (width - len(row)) for row in rows]
    whole = [(*f, *r) if left else (*r, *f) for f, r in zip(fill, rows, strict=True)]
    return torch.tensor(whole, dtype=torch.long)
