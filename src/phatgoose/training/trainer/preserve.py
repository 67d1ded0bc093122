"""Borrowing a model for training: whatever happens to it inside, it comes back as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.attach.hooks import forget_compiled
from phatgoose.models.base.base import Base
from phatgoose.routers import Single


@contextlib.contextmanager
def preserved(model: PreTrainedModel) -> Iterator[None]:
    """Gives back the very same modules, parameters, buffers, hooks, modes, requires_grad flags, gradients and configuration.

    PEFT replaces modules, Trainer sets flags, training hooks in. Their own undoing is neither complete nor safe against
    an exception in its midst, so all of it is put back from a snapshot of references (no weights are copied: nothing here
    writes to a frozen weight). Also on errors and KeyboardInterrupt.
    """
    modules = [(module, _state(module)) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    configs = [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]
    settings = [(c, dict(vars(c))) for c in configs]
    try:
        yield
    finally:
        forget_compiled()
        for module, (attributes, registries) in modules:
            for registry, content in registries:
                registry.clear()
                registry.update(content)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for config, values in settings:
            vars(config).clear()
            vars(config).update(values)


@contextlib.contextmanager
def expert_attached(base: Base, expert: Expert) -> Iterator[None]:
    """Inside, the base has this expert on every token, and no dropout; the base is unrouted before and after.

    Raises:
        RoutingError, BaseModelError: the expert doesn't fit the base.
    """
    training = [module for module in base.model.modules() if module.training]
    base.model.eval()
    try:
        route(base, Pool([expert]), Single(0))
        yield
    finally:
        unroute(base)
        for module in training:
            module.training = True


def _state(module: torch.nn.Module) -> tuple[dict[str, Any], list[tuple[dict[Any, Any], dict[Any, Any]]]]:
    """A module's attributes, and the content of those that are tables: submodules, parameters, buffers, hooks."""
    attributes = dict(module.__dict__)
    tables = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]
    return attributes, tables


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Training seeds the global generators; the caller's own random numbers go on as if it hadn't."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda = (
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    )
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
