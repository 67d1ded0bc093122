"""Examples → token rows that fit the model, and the rule that judges generated answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from phatgoose.errors import EvaluationError, TaskError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.models.base.base import Base, context_length, end_tokens
from phatgoose.models.text.encoding import UNLIMITED, Encoded, decode_text, encode_answers
from phatgoose.records import Example, Prediction


@dataclass(frozen=True)
class MatchRule:
    """How one row's generated answer is judged: a rule on text and token ids, without a model.

    The answer is the text up to an end token or the first newline (unless a target of the row holds a
    newline), stripped. It is right if and only if it equals one of the targets; case counts. A generation that
    reaches its limit without an end is wrong.
    """

    tokenizer: PreTrainedTokenizerBase
    targets: frozenset[str]
    """Stripped."""
    ends: Collection[int]
    limit: int
    """Most tokens, the end token included."""

    def judge(self, tokens: Sequence[int], *, to_the_end: bool = False) -> Prediction | None:
        """The verdict on a generation that starts with `tokens`; None while it depends on what follows.

        Gives up (`complete` is False) where no continuation can equal a target, unless `to_the_end`.
        """
        stop = next((position for position, token in enumerate(tokens) if token in self.ends), None)
        kept = list(tokens[:stop])
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if "\n" in text and not any("\n" in target for target in self.targets):
            text, stop = text.partition("\n")[0], len(tokens)
        answer = text.strip()
        if stop is not None:
            return Prediction(answer in self.targets, answer)
        if len(tokens) >= self.limit or not (to_the_end or any(_may_become(text, t) for t in self.targets)):
            return Prediction(False, answer, complete=False)
        return None


@dataclass(frozen=True)
class Row:
    """One example as tokens. Each answer ends in the end token."""

    index: int
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    """Its choices, or its targets."""
    truncated: bool = False
    """True if the prompt was cut to fit."""


@dataclass(frozen=True, kw_only=True)
class OpenRow(Row):
    """A row without choices: its answer is generated, and judged by a rule."""

    rule: MatchRule


def encode(base: Base, example: Example, index: int, config: EvaluationConfig) -> Row:
    """Row `index` as tokens: an `OpenRow` if the example has no choices.

    A prompt that doesn't fit into the context with each answer is cut from the left, the same for all, and marked.

    Raises:
        EvaluationError: naming the row, if it has no answers, a text has no tokens, or an answer fills the
            model's context.
    """
    answers = example.targets if example.choices is None else example.choices
    if not answers:
        raise EvaluationError(
            f"row {index}: it has no {'targets' if example.choices is None else 'choices'}."
        )
    whole = _encode(base, example, answers, index, UNLIMITED)
    prompt, tokens = whole[0].prompt_ids, tuple(e.target_ids for e in whole)
    longest = max(len(t) for t in tokens)
    rule = None if example.choices is not None else _rule(base, example, tokens, config)
    room = _prompt_room(base, rule.limit if rule else longest, index, config)
    truncated = len(prompt) > room
    if truncated:
        most = room if base.is_encoder_decoder else room + longest
        prompt = _encode(base, example, answers, index, most)[0].prompt_ids
    if rule is None:
        return Row(index, prompt, tokens, truncated)
    return OpenRow(index, prompt, tokens, truncated, rule=rule)


def _may_become(text: str, target: str) -> bool:
    """True if some continuation of `text`, stripped, can equal `target` (stripped)."""
    # A character's last bytes may still be missing; they decode to U+FFFD until they come.
    start = text.rstrip("\ufffd").lstrip()
    return target.startswith(start) or start.rstrip() == target


def _encode(
    base: Base, example: Example, answers: Sequence[str], index: int, max_length: int
) -> list[Encoded]:
    try:
        return encode_answers(base, example, answers, max_length)
    except TaskError as error:
        raise EvaluationError(f"row {index}: {error}") from error


def _rule(
    base: Base, example: Example, answers: Sequence[tuple[int, ...]], config: EvaluationConfig
) -> MatchRule:
    limit = config.max_new_tokens or max(map(len, answers)) + config.slack_tokens
    targets = {target.strip() for target in example.targets}
    if example.conversation is not None:
        # Also as the chat template writes an answer: a tool call, an empty thought before the text.
        targets |= {decode_text(base.tokenizer, answer).strip() for answer in answers}
    ends = end_tokens(base.model, base.tokenizer.eos_token_id)
    return MatchRule(base.tokenizer, frozenset(targets), ends, limit)


def _prompt_room(base: Base, answer: int, index: int, config: EvaluationConfig) -> int:
    """Most tokens of a prompt that leave room for an answer of `answer` tokens."""
    context = context_length(base.model) or UNLIMITED
    room = context if base.is_encoder_decoder else context - answer
    if room < 1 or answer > context:
        raise EvaluationError(
            f"row {index}: an answer of {answer} tokens (max_new_tokens and slack_tokens count) leaves no room for its "
            f"prompt in the model's context of {context}."
        )
    return min(room, config.max_input_tokens or room)
