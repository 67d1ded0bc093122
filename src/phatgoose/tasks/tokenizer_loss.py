"""Which tasks a tokenizer can't write.

Their answers have unknown tokens, or choices that become the same tokens. docs/experiments.md says how the limits
were set.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from phatgoose.records import Example, Task

ROWS = 200
ANSWERS_LOST = 0.2
"""A task is out if more than this share of its rows has an answer that the tokenizer loses."""
PROMPT_LOST = 0.02
"""A task is out if more than this share of its prompts' tokens is unknown. A single one may be what decides."""


@dataclass(frozen=True)
class TokenizerLoss:
    """How much of a task a tokenizer loses, on its first test rows (a random sample)."""

    answers: float
    """Share of rows with an unknown token in a choice or target, or two choices of the same tokens."""
    prompt: float
    """Share of unknown tokens in the prompts."""

    @property
    def too_much(self) -> bool:
        """True if a model with this tokenizer shouldn't be measured on the task."""
        return self.answers > ANSWERS_LOST or self.prompt > PROMPT_LOST

    def __str__(self) -> str:
        return (
            f"{self.answers:.0%} of its rows have answers that the tokenizer can't write, "
            f"{self.prompt:.0%} of the prompts' tokens are unknown"
        )


def tokenizer_loss(tokenizer: PreTrainedTokenizerBase, task: Task, rows: int = ROWS) -> TokenizerLoss:
    """The TokenizerLoss on the first `rows` test rows, or those of another split if there are none."""
    examples = (task.test or task.validation or task.train)[:rows]
    tokens = [_ids(tokenizer, e.input) for e in examples]
    total = sum(map(len, tokens))
    return TokenizerLoss(
        answers=sum(_loses_answer(tokenizer, e) for e in examples) / max(1, len(examples)),
        prompt=sum(ids.count(tokenizer.unk_token_id) for ids in tokens) / max(1, total),
    )


def _loses_answer(tokenizer: PreTrainedTokenizerBase, example: Example) -> bool:
    answers = [_ids(tokenizer, text) for text in example.choices or example.targets]
    if any(not ids or tokenizer.unk_token_id in ids for ids in answers):
        return True
    return example.choices is not None and len({tuple(ids) for ids in answers}) < len(answers)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
