"""A task's rows → the encoded rows of every step, in an order that depends only on the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Subset

from phatgoose.errors import TaskError, TrainingError
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import Encoded, encode_answers
from phatgoose.records import Example, Task
from phatgoose.training.config import LoopConfig


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one training."""

    encoded: dict[int, Encoded]
    """The training rows that are used, by their numbers."""
    order: list[int]
    """Their numbers in the order of the training, rows_per_step for each step."""
    validation: list[Encoded]

    @property
    def train(self) -> Subset[Encoded]:
        """The rows of the whole training in their order."""
        return Subset(self.encoded, self.order)  # type: ignore[arg-type]  # any mapping from index to row will do

    @property
    def truncated(self) -> int:
        """Number of distinct training and validation rows whose prompt was truncated."""
        return sum(row.truncated for row in [*self.encoded.values(), *self.validation])

    @property
    def tokens(self) -> int:
        """Tokens seen in training, without padding."""
        return sum(self.encoded[i].length for i in self.order)

    @property
    def target_tokens(self) -> int:
        """Target tokens seen in training, which the loss averages over."""
        return sum(len(self.encoded[i].target_ids) for i in self.order)


def training_rows(base: Base, task: Task, config: LoopConfig) -> TrainingRows:
    """Draws and encodes the rows of a training. Rows that are never drawn are not encoded.

    A TrainingError if rows of a split are missing, or one can't be encoded (its target is longer than max_length).
    """
    if not task.train:
        raise TrainingError(f"task {task.name!r} has no training rows: there is nothing to train on.")
    if config.validate_every and not task.validation:
        raise TrainingError(
            f"task {task.name!r} has no validation rows, on which the best checkpoint would be chosen: "
            "set validate_every=0 to take the last one, or give the task a validation split."
        )
    order = draw_rows(len(task.train), config.steps * config.rows_per_step, config.seed)
    encoded = encode_rows(base, task, "training", sorted(set(order)), config.max_length)
    for start in range(0, len(order), config.rows_per_step):
        step = slice(start, start + config.rows_per_step)
        # Longest first within a step: its batches then hold rows of similar length, and its gradient stays the same.
        order[step] = sorted(order[step], key=lambda i: (-encoded[i].length, i))
    chosen: list[int] = []
    if config.validate_every:
        chosen = draw_rows(len(task.validation), len(task.validation), seed=0)[: config.validation_rows]
    validation = encode_rows(base, task, "validation", sorted(chosen), config.max_length)
    return TrainingRows(encoded, order, list(validation.values()))


def draw_rows(rows: int, count: int, seed: int) -> list[int]:
    """`count` row numbers below `rows` in shuffled passes: every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < count:
        drawn.extend(torch.randperm(rows, generator=generator).tolist())
    return drawn[:count]


def encode_rows(
    base: Base, task: Task, split: str, which: Sequence[int], max_length: int
) -> dict[int, Encoded]:
    """Row number → the row with its first target, for the rows `which` of the "training" or "validation" split.

    A TrainingError names the row that can't be encoded.
    """
    examples: Sequence[Example] = task.train if split == "training" else task.validation
    encoded = {}
    for index in which:
        example = examples[index]
        try:
            (encoded[index],) = encode_answers(base, example, example.targets[:1], max_length)
        except TaskError as cause:
            raise TrainingError(f"task {task.name!r}, {split} row {index}: {cause}") from cause
    return encoded
