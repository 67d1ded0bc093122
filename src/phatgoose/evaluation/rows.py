"""Examples → token rows that fit the model, and the rules by which generations are judged."""

from __future__ import annotations

from collections.abc import Sequence

from phatgoose.errors import EvaluationError, TaskError
from phatgoose.evaluation.answers import Rule
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import Row
from phatgoose.models.base.base import Base, context_length, end_tokens
from phatgoose.models.text.encoding import UNLIMITED, Encoded, decode_text, encode_answers
from phatgoose.records import Example


def encode(base: Base, example: Example, index: int, config: EvaluationConfig) -> tuple[Row, Rule | None]:
    """Row `index` as tokens: its answers are its choices, or its targets with the rule for judging a generation.

    A prompt that doesn't fit beside the answers is cut from the left, the same for all of them, and marked.

    Raises:
        EvaluationError: naming the row, if it has no answers, a text has no tokens, or an answer fills the model's context.
    """
    answers = example.targets if example.choices is None else example.choices
    if not answers:
        raise EvaluationError(
            f"row {index}: it has no {'targets' if example.choices is None else 'choices'}."
        )
    whole = _encode(base, example, answers, index, UNLIMITED)
    tokens = tuple(e.target_ids for e in whole)
    longest = max(len(t) for t in tokens)
    rule = None if example.choices is not None else _rule(base, example, tokens, config)
    room = _room(base, rule.limit if rule else longest, index, config)
    if len(whole[0].prompt_ids) <= room:
        return Row(index, whole[0].prompt_ids, tokens), rule
    cut = _encode(base, example, answers, index, room if base.is_encoder_decoder else room + longest)
    return Row(index, cut[0].prompt_ids, tokens, truncated=True), rule


def _encode(
    base: Base, example: Example, answers: Sequence[str], index: int, max_length: int
) -> list[Encoded]:
    try:
        return encode_answers(base, example, answers, max_length)
    except TaskError as error:
        raise EvaluationError(f"row {index}: {error}") from error


def _rule(base: Base, example: Example, answers: Sequence[tuple[int, ...]], config: EvaluationConfig) -> Rule:
    limit = config.max_new_tokens or max(map(len, answers)) + config.slack_tokens
    targets = {target.strip() for target in example.targets}
    if (
        example.conversation is not None
    ):  # also as the template writes it: a call, an empty thought before the answer
        targets |= {decode_text(base.tokenizer, answer).strip() for answer in answers}
    ends = end_tokens(base.model, base.tokenizer.eos_token_id)
    return Rule(base.tokenizer, frozenset(targets), ends, limit)


def _room(base: Base, answer: int, index: int, config: EvaluationConfig) -> int:
    """Most tokens of a prompt beside an answer of `answer` tokens."""
    context = context_length(base.model) or UNLIMITED
    room = context if base.is_encoder_decoder else context - answer
    if room < 1 or answer > context:
        raise EvaluationError(
            f"row {index}: an answer of {answer} tokens (max_new_tokens and slack_tokens count) leaves no room for its "
            f"prompt in the model's context of {context}."
        )
    return min(room, config.max_input_tokens or room)
