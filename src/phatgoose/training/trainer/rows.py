"""A task's rows → the encoded rows of every step, in an order that depends only on the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from phatgoose.errors import TaskError, TrainingError
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import Encoded, encode_answers
from phatgoose.records import Example, Task
from phatgoose.training.config import LoopConfig


class OrderedRows(Dataset):
    """The rows of a whole training in their order, rows_per_step for each step."""

    def __init__(self, encoded: dict[int, Encoded], order: Sequence[int]) -> None:
        self.encoded = encoded
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Encoded:
        return self.encoded[self.order[index]]


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one training."""

    train: OrderedRows
    validation: list[Encoded]
    truncated: int
    """Number of distinct training and validation rows whose prompt was truncated."""

    @property
    def tokens(self) -> int:
        """Tokens seen in training, without padding."""
        return sum(self.train[i].length for i in range(len(self.train)))

    @property
    def target_tokens(self) -> int:
        """Target tokens seen in training, which the loss averages over."""
        return sum(len(self.train[i].target_ids) for i in range(len(self.train)))


def training_rows(base: Base, task: Task, config: LoopConfig) -> TrainingRows:
    """Draws and encodes the rows of a training. Rows that are never drawn are not encoded.

    Raises:
        TrainingError: there are no training rows, no validation rows although validation is on, or a row can't be
            encoded (its target is longer than max_length).
    """
    if not task.train:
        raise TrainingError(f"task {task.name!r} has no training rows: there is nothing to train on.")
    if config.validate_every and not task.validation:
        raise TrainingError(
            f"task {task.name!r} has no validation rows, on which the best checkpoint would be chosen: "
            "set validate_every=0 to take the last one, or give the task a validation split."
        )
    order = draw_rows(len(task.train), config.steps * config.rows_per_step, config.seed)
    train = encode_rows(base, task.name, "training", task.train, sorted(set(order)), config.max_length)
    lengths = {index: row.length for index, row in train.items()}
    size = config.rows_per_step
    for start in range(0, len(order), size):
        # Longest first within a step: its batches then hold rows of similar length, and its gradient stays the same.
        order[start : start + size] = sorted(order[start : start + size], key=lambda i: (-lengths[i], i))
    chosen: list[int] = []
    if config.validate_every:
        count = min(config.validation_rows, len(task.validation))
        chosen = sorted(draw_rows(len(task.validation), len(task.validation), seed=0)[:count])
    validation = encode_rows(base, task.name, "validation", task.validation, chosen, config.max_length)
    truncated = sum(row.truncated for row in [*train.values(), *validation.values()])
    return TrainingRows(OrderedRows(train, order), list(validation.values()), truncated)


def draw_rows(rows: int, count: int, seed: int) -> list[int]:
    """`count` row numbers below `rows` in shuffled passes: every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < count:
        drawn.extend(torch.randperm(rows, generator=generator).tolist())
    return drawn[:count]


def encode_rows(
    base: Base, name: str, split: str, examples: Sequence[Example], which: Sequence[int], max_length: int
) -> dict[int, Encoded]:
    """Row number → the row with its first target, for the rows `which` of a task's split.

    Raises:
        TrainingError: a row can't be encoded; the message names it.
    """
    encoded = {}
    for index in which:
        example = examples[index]
        try:
            (encoded[index],) = encode_answers(base, example, example.targets[:1], max_length)
        except TaskError as cause:
            raise TrainingError(f"task {name!r}, {split} row {index}: {cause}") from cause
    return encoded
