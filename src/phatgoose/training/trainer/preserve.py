"""Borrow a model for training: afterwards it is exactly as before."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.attach.hooks import forget_compiled
from phatgoose.models.base.base import Base, eval_mode
from phatgoose.routers import Single


def refuse_routed(base: Base) -> None:
    """Raises a TrainingError if routing is attached to the base."""
    if routing_of(base) is not None:
        raise TrainingError("routing is attached to the base: call unroute(base) first.")


@contextlib.contextmanager
def preserved(model: PreTrainedModel) -> Iterator[None]:
    """Restores modules, parameters, buffers, hooks, modes, requires_grad flags, gradients and configuration at the end.

    PEFT replaces modules, Trainer sets flags, training adds hooks. Their own undoing is neither complete nor safe
    against an exception in between, so everything is restored from a snapshot of references, also on errors and
    KeyboardInterrupt. No weights are copied, because nothing here writes to a frozen weight.
    """
    owners = [*model.modules(), model.config, getattr(model, "generation_config", None)]
    attributes = [vars(owner) for owner in owners if owner is not None]
    # Also what each attribute of a module that is a dict holds: submodules, parameters, buffers, hooks.
    registries = [v for module in model.modules() for v in vars(module).values() if isinstance(v, dict)]
    snapshot = [(found, dict(found)) for found in [*registries, *attributes]]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        forget_compiled()
        for found, content in snapshot:
            found.clear()
            found.update(content)
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextlib.contextmanager
def expert_attached(base: Base, expert: Expert) -> Iterator[None]:
    """Routes every token to this expert inside, without dropout. Afterwards the base is unrouted, as before."""
    with eval_mode(base.model):
        try:
            route(base, Pool([expert]), Single(0))
            yield
        finally:
            unroute(base)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the global random generators, which training seeds, so that the caller's random numbers don't change."""
    python, numpy = random.getstate(), np.random.get_state()
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(used, device_type="cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
