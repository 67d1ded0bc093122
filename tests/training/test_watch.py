"""Progress is told within a step that takes long, and only there."""

from __future__ import annotations

import pytest
from training_helpers import SMALL, make_task

from phatgoose.training.config import ExpertConfig
from phatgoose.training.expert import train_expert
from phatgoose.training.trainer import loop


@pytest.mark.slow(10)
@pytest.mark.parametrize(("seconds", "parts"), [(0.0, [0.25, 0.5, 0.75]), (600.0, [])])
def test_progress_within_a_step(make_base, monkeypatch, seconds, parts):
    monkeypatch.setattr(loop, "WITHIN_SECONDS", seconds)
    config = ExpertConfig(
        **{**SMALL, "steps": 2, "rows_per_step": 8, "rows_per_batch": 2, "validate_every": 0}
    )
    seen = []
    train_expert(make_base("llama"), make_task(), config, report=seen.append)
    assert [(p.step, p.part) for p in seen if p.part] == [(step, part) for step in (0, 1) for part in parts]
    assert [p.step for p in seen if not p.part] == [0, 1, 2]
    assert all(p.rows_per_second > 0 for p in seen[1:])
