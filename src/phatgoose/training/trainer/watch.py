"""Between the steps of a loop: check the loss, validate, save, report progress."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl

from phatgoose.errors import TrainingError
from phatgoose.training.trainer.job import TrainingJob
from phatgoose.training.trainer.progress import Progress, Report

ADVICE = (
    "lower learning_rate, set max_grad_norm=1.0, or compute in float32. Nothing of this step was written."
)

WITHIN_SECONDS = 15.0
"""A step that takes longer than this reports progress within the step."""


class LoopCallback(TrainerCallback):
    """Stops at a loss that isn't finite, decides when to validate and save, and reports progress."""

    def __init__(self, loop: Any, job: TrainingJob, report: Report) -> None:
        self.loop, self.config, self.label, self.report = loop, job.config, job.label, report
        self.first_step, self.since = 0, time.monotonic()
        self.shown, self.batches = self.since, 0

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self.first_step, self.since = state.global_step, time.monotonic()
        self.loop.started = self.since
        self._show(state)

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self.batches = 0

    def on_substep_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self.batches += 1
        if time.monotonic() - self.shown >= WITHIN_SECONDS:
            self._show(state, self.batches / args.gradient_accumulation_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        loss = self.loop.take_step_loss()
        if not math.isfinite(loss):
            raise TrainingError(f"{self.label}: the loss is {loss} at step {state.global_step + 1}: {ADVICE}")
        self.loop.history.losses.append(loss)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        step, last = state.global_step, state.global_step == self.config.steps
        every, save = self.config.validate_every, self.config.save_every
        control.should_evaluate = bool(every) and (step % every == 0 or last)
        control.should_save = bool(save) and step % save == 0 and not last
        if not control.should_evaluate:
            self._show(state)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def _show(self, state: Any, part: float = 0.0) -> None:
        self.shown = time.monotonic()
        if not state.is_world_process_zero:
            return
        history, step = self.loop.history, state.global_step
        pace = (step + part - self.first_step) / max(time.monotonic() - self.since, 1e-9)
        self.report(
            Progress(
                self.label,
                step,
                self.config.steps,
                history.losses[-1] if history.losses else None,
                list(history.validation.values())[-1] if history.validation else None,
                pace * self.config.rows_per_step,
                (self.config.steps - step - part) / pace if pace else math.inf,
                part,
            )
        )
