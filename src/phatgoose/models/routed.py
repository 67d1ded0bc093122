"""Attach routing to a model, and take it off again.

A forward hook on each adapted module adds Σ w_e Δ_e(u) to the module's own output. Modules, parameter names and the state
dict stay as they are, so generate(), save_pretrained(), device_map and quantised bases go on working.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import check_same_base
from phatgoose.models.base import Base
from phatgoose.models.fingerprint import fingerprint
from phatgoose.models.streams import Streams
from phatgoose.ops import Backend, Stack, backend, make_stack
from phatgoose.records import Fingerprint
from phatgoose.registry import unknown
from phatgoose.routers import PHATGOOSE, Router
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates

ATTRIBUTE = "_phatgoose_routing"
Recorder = Callable[[RoutingContext, tuple[int, ...], Tensor, Tensor], None]
"""Called with a module's context, its candidates' indices in the pool, chosen candidates [N, k] and weights [N, k]."""


def route(
    model: Base | PreTrainedModel,
    pool: Pool,
    router: Router | None = None,
    *,
    backend_name: str = "auto",
    any_base: bool = False,
) -> PreTrainedModel:
    """Attaches routing and returns the same model object; an earlier routing is replaced.

    Args:
        model: the base the pool's experts were trained on.
        pool: the experts.
        router: who chooses; PHATGOOSE(top_k=2) if None.
        backend_name: "auto", "torch" or "reference".
        any_base: skip the check that `model` is the pool's base (for bases that are knowingly a variant of it).

    Raises:
        BaseModelError: `model` is not the base the pool records.
        RoutingError: a module is missing or of another shape, or the router can't serve this pool.
    """
    bare = model.model if isinstance(model, Base) else model
    router = PHATGOOSE() if router is None else router
    if not any_base and pool.base is not None:
        check_same_base(pool.base, _fingerprint(model), "the pool's experts")
    router.check(pool.names)
    routing = Routing(bare, pool, router, backend(backend_name))  # raises before anything is attached
    unroute(bare)
    routing.attach()
    return bare


def _fingerprint(model: Base | PreTrainedModel) -> Fingerprint:
    if isinstance(model, Base):
        return model.fingerprint
    known = model.__dict__.get("_phatgoose_base")
    return (
        known.fingerprint
        if known is not None
        else fingerprint(model, model.name_or_path or type(model).__name__)
    )


def unroute(model: Base | PreTrainedModel) -> PreTrainedModel:
    """Takes routing off; the model's outputs are bit for bit what they were before. Does nothing if there is none."""
    bare = model.model if isinstance(model, Base) else model
    routing = bare.__dict__.pop(ATTRIBUTE, None)
    if routing is not None:
        routing.detach()
    return bare


def routing_of(model: Base | PreTrainedModel) -> Routing | None:
    """The routing attached to a model, or None."""
    bare = model.model if isinstance(model, Base) else model
    return bare.__dict__.get(ATTRIBUTE)


class Routing:
    """A pool and a router, bound to the modules of one model."""

    def __init__(self, model: PreTrainedModel, pool: Pool, router: Router, ops: Backend):
        self.model, self.pool, self.router, self.ops = model, pool, router, ops
        self.streams = Streams(model)
        self.recorder: Recorder | None = None
        self._handles: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        self.sites = [_Site(self, path, _module(modules, path, pool), pool) for path in pool.modules]

    def attach(self) -> None:
        self.model.__dict__[ATTRIBUTE] = self
        self._handles = self.streams.attach()
        self._handles += [
            site.module.register_forward_hook(site.hook, with_kwargs=True) for site in self.sites
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Site:
    """Routing at one module."""

    def __init__(self, routing: Routing, path: str, module: nn.Module, pool: Pool):
        self.routing, self.path, self.module = routing, path, module
        members = [i for i, e in enumerate(pool.experts) if path in e.updates]
        updates = [pool.experts[i].updates[path] for i in members]
        d_in, d_out = updates[0].d_in, updates[0].d_out
        parts = [(u.A, u.B, u.scale) for u in updates]
        gates = [(pool.experts[i].gates or {}).get(path) for i in members]
        if routing.router.offers_null and len(members) < len(pool.experts):
            members.append(-1)
            parts.append((torch.zeros(0, d_in), torch.zeros(d_out, 0), 1.0))
            gates.append(None)
        self.members = tuple(members)
        self.stack: Stack = make_stack(parts, d_in, d_out, _compute_dtype(module, routing.model))
        candidates = Candidates(path, pool.names, self.members, tuple(gates), d_in)
        self.router: BoundRouter = routing.router.bind(candidates)

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        # With offloading the module's input may still be where the last module left it.
        u = (args[0] if args else next(iter(kwargs.values()))).to(output.device)
        flat = u.reshape(-1, u.shape[-1])
        if self.stack.A.device != u.device:
            self.stack = self.stack.to(u.device)
        rows, length = (u.shape[0], flat.shape[0] // max(u.shape[0], 1)) if u.ndim > 2 else (1, flat.shape[0])
        context = RoutingContext(self.path, rows, length, self.routing.streams.seen_by(self.path))
        chosen, weights = self.router(flat, context, self.routing.ops)
        if self.routing.recorder is not None:
            self.routing.recorder(context, self.members, chosen, weights)
        y = output.reshape(-1, output.shape[-1])
        return self.routing.ops.mix(flat, y, self.stack, chosen, weights).reshape(output.shape)


def _module(modules: dict[str, nn.Module], path: str, pool: Pool) -> nn.Module:
    """The model's module at `path`, checked against the updates of every expert that adapts it."""
    owner = next(e.name for e in pool.experts if path in e.updates)
    if path not in modules:
        raise RoutingError(
            f"expert {owner!r} adapts a module this model lacks: {unknown('module', path, modules)}"
        )
    module = modules[path]
    shape = linear_shape(module)
    if shape is None:
        raise RoutingError(
            f"expert {owner!r} adapts {path}, a {type(module).__name__}; only linear layers can be routed."
        )
    for expert in pool.experts:
        update = expert.updates.get(path)
        if update is not None and (update.d_in, update.d_out) != shape:
            raise RoutingError(
                f"expert {expert.name!r} has an update {update.d_in} → {update.d_out} at {path}, where this model has {shape[0]} → {shape[1]}."
            )
    return module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer of any kind (plain, Conv1D, quantised), None if it isn't one.

    Taken from the layer's own record of its sizes: a packed quantised weight has another shape.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the second pair is transformers' Conv1D
        d_in, d_out = (getattr(module, name, None) for name in names)
        if isinstance(d_in, int) and isinstance(d_out, int):
            return d_in, d_out
    return None


def _compute_dtype(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    """The dtype the module computes in: its weight's, or the model's if the weight is packed."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        return weight.dtype
    return model.dtype
