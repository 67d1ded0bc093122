"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from phatgoose.errors import EvaluationError


@dataclass(frozen=True)
class EvaluationConfig:
    """How to evaluate. What is measured does not depend on the batch sizes, up to rounding."""

    batch_tokens: int | None = None
    """Most tokens in one forward, padding included. None: 2048 on a CPU, 16384 on an accelerator."""
    batch_rows: int = 256
    """Most rows in one forward."""
    cache_tokens: int = 32768
    """Most positions (rows × length) kept in key-value caches: of prompts, of what they begin with, and of
    their copies for answers."""
    logit_values: int = 2**26
    """Most logits (rows × length × vocabulary) asked of the model at a time."""
    max_input_tokens: int | None = None
    """Most tokens of a prompt; longer ones are cut from the left and counted. None: what the model's context allows."""
    max_new_tokens: int | None = None
    """Most tokens of a generated answer. None: the row's longest target in tokens, and `slack_tokens` more."""
    slack_tokens: int = 16
    """Room for an answer that is spelt in more tokens than the target's own tokenisation."""
    level: float = 0.95
    """Level of the bootstrap intervals."""
    resamples: int = 2000
    """Resamples of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap; nothing else is random."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            least = 0 if setting.name in ("slack_tokens", "seed") else 1
            if setting.name != "level" and value is not None and value < least:
                raise EvaluationError(f"{setting.name} must be at least {least}, got {value}.")
        if not 0 < self.level < 1:
            raise EvaluationError(f"level must lie between 0 and 1, got {self.level}.")

    def tokens_for(self, device: torch.device) -> int:
        """`batch_tokens`, or its default for `device`."""
        return self.batch_tokens or (2048 if device.type == "cpu" else 16384)
