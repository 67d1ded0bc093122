"""What the quickstart does, fixed before it runs: base, tasks, rows, settings and the claims it is held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from phatgoose.training.config import ExpertConfig, GateConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One contributor per in-pool task trains an expert and its gates; everything is then measured on the test splits."""

    base: str
    """Spec of the base model."""
    pool_tasks: tuple[str, ...]
    """Specs of the tasks that experts are trained on, one expert each."""
    held_out_tasks: tuple[str, ...]
    """Specs of tasks that no expert saw, neither by name nor by content."""
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    top_k: int = 2
    """Experts per token, for PHATGOOSE and for the random control."""
    train_rows: int = 2000
    """At most this many rows of a task's training split."""
    test_rows: int = 100
    """Rows of each test split that all systems are measured on."""
    held_out_test_share: float = 0.7
    """Share of a held-out task's rows that go to its test split; the rest is validation, as nothing is trained there."""
    choice_rows: int = 32
    """Rows of each validation split on which the oracle chooses its expert."""
    seed: int = 0
    """Of the random control."""
    shown_prompts: int = 6
    """In-pool prompts (the first test row of each task) whose routing the page shows."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


RECOVERED_FLOOR = 0.6
"""The share of the oracle's gain over the base that PHATGOOSE must recover on the in-pool tasks; 0.8 is the aim."""
