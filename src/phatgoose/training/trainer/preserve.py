"""Borrow a model for training: afterwards it is exactly as before."""

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
from phatgoose.models.base.base import Base, eval_mode
from phatgoose.routers import Single


@contextlib.contextmanager
def preserved(model: PreTrainedModel) -> Iterator[None]:
    """Restores modules, parameters, buffers, hooks, modes, requires_grad flags, gradients and configuration at the end.

    PEFT replaces modules, Trainer sets flags, training adds hooks. Their own undoing is neither complete nor safe
    against an exception in between, so everything is restored from a snapshot of references, also on errors and
    KeyboardInterrupt. No weights are copied, because nothing here writes to a frozen weight.
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
    """Routes every token to this expert inside, without dropout. Afterwards the base is unrouted, as before.

    Raises:
        RoutingError, BaseModelError: the expert doesn't fit the base.
    """
    with eval_mode(base.model):
        try:
            route(base, Pool([expert]), Single(0))
            yield
        finally:
            unroute(base)


def _state(module: torch.nn.Module) -> tuple[dict[str, Any], list[tuple[dict[Any, Any], dict[Any, Any]]]]:
    """A module's attributes, and a copy of each that is a dict: submodules, parameters, buffers, hooks."""
    attributes = dict(module.__dict__)
    return attributes, [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the global random generators, which training seeds, so that the caller's random numbers don't change."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if uses_cuda else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
