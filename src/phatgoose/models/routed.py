"""Attach routing to a model, and take it off again.

A forward hook on each adapted module adds Σ w_e Δ_e(u) to the module's own output. Modules, parameter names and the state
dict stay as they are, so generate(), save_pretrained(), device_map and quantised bases go on working.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.experts.update import Update
from phatgoose.fingerprints import check_same_base
from phatgoose.memory import available_bytes
from phatgoose.models.base import Base
from phatgoose.models.device_memory import Budget, cacheable, parse_bytes
from phatgoose.models.fingerprint import fingerprint
from phatgoose.models.fits import check_finite_stack
from phatgoose.models.layers import (
    compute_dtype,
    dense_weight,
    follow_residual,
    given,
    is_plain,
    layer_of,
    residual_source,
    unseen,
)
from phatgoose.models.modules import check_copies, check_parameters, module_at, shape_of
from phatgoose.models.moe import Slot, context_at
from phatgoose.models.moe_paths import modules_of
from phatgoose.models.moe_pool import under_one_name
from phatgoose.models.placement import placed_pool
from phatgoose.models.prompted import ATTRIBUTE, setup_of
from phatgoose.models.recorder import Recorder
from phatgoose.models.reference import show_reference
from phatgoose.models.streams import Streams
from phatgoose.ops import Backend, Fused, Prepared, Stack, backend, make_stack
from phatgoose.ops.cached import Cached
from phatgoose.records import Fingerprint
from phatgoose.routers import PHATGOOSE, Router
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates


def route(
    model: Base | PreTrainedModel,
    pool: Pool,
    router: Router | None = None,
    *,
    backend_name: str = "auto",
    any_base: bool = False,
    dtype: torch.dtype | None = None,
    device_memory: int | str | None = None,
) -> PreTrainedModel:
    """Attaches routing and returns the same model object; an earlier routing is replaced.

    Args:
        model: the base the pool's experts were trained on.
        pool: the experts.
        router: who chooses; PHATGOOSE(top_k=2) if None.
        backend_name: "auto", "cpu" (a compiled kernel) and "triton" (GPUs), both inference only, "torch" or "reference".
        dtype: what the experts' matrices are kept and multiplied in; None: what each module computes in. With float32 on a
            bfloat16 base the experts' own rounding is gone, as in PEFT, at twice the memory.
        any_base: skip the check that `model` is the pool's base (for bases that are knowingly a variant of it).
        device_memory: bytes, or "8GB": the pool may take that much of the model's devices. Coarse gates stand there, experts are
            brought there when they are needed, the rest stays on the host (`cache_use` counts). Choices are the same. None: all of it.

    Raises:
        BaseModelError: `model` is not the base the pool records.
        RoutingError: a module is missing or of another shape, the router can't serve this pool, or not with so little memory.
    """
    bare = model.model if isinstance(model, Base) else model
    router = PHATGOOSE() if router is None else router
    if not any_base and pool.base is not None:
        check_same_base(pool.base, _fingerprint(model), "the pool's experts")
    router.check(pool.names)
    ops = backend(backend_name, bare.device.type)
    budget = None if device_memory is None else parse_bytes(device_memory)
    routing = Routing(bare, pool, router, ops, dtype, budget)  # raises before anything is attached
    _calibrate(model, routing)
    unroute(bare)
    routing.attach()
    return bare


def _calibrate(model: Base | PreTrainedModel, routing: Routing) -> None:
    """Shows the reference text to the sites whose routers need it, on the base alone."""
    sites = [site for site in routing.sites if site.router.needs_reference]
    if not sites:
        return
    bare, earlier = routing.model, routing_of(model)
    base = model if isinstance(model, Base) else bare.__dict__.get("_phatgoose_base")
    if base is None:
        raise RoutingError(
            f"{type(routing.router).__name__} compares scores on reference text, for which it needs the tokenizer: pass the Base."
        )
    if earlier is not None:
        earlier.detach()
    try:
        show_reference(
            bare,
            base.tokenizer,
            [(s.module, s.embedding, partial(s.router.observe, ops=routing.ops)) for s in sites],
        )
    finally:
        if earlier is not None:
            earlier.attach()
    for site in sites:
        if isinstance(site.module, Slot):  # others all see the text, or never run
            site.router.check_observed()


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

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pool,
        router: Router,
        ops: Backend,
        dtype: torch.dtype | None = None,
        device_memory: int | None = None,
    ):
        modules = modules_of(model, pool.modules)
        pool, self.renamed = placed_pool(model, modules, pool)
        check_copies(modules, pool.experts)
        check_parameters(modules, pool.experts)
        if (named := under_one_name(model, pool, modules)) is not pool:
            pool, modules = named, modules_of(model, named.modules)
        self.model, self.pool, self.router, self.ops, self.dtype = model, pool, router, ops, dtype
        self.device_memory, self.memory = device_memory, available_bytes()
        self.ready = router.prepared(setup_of(model, pool))
        self.streams = Streams(model, reads_text=router.reads == "texts")
        self.recorder: Recorder | None = None
        self._handles: list[RemovableHandle] = []
        self.sites = [_Site(self, path, module_at(modules, path, pool), pool) for path in pool.modules]
        self.budget = None if device_memory is None else Budget(self.sites, device_memory)
        pool.let_go_of_gates()

    @property
    def copied(self) -> dict[str, str]:
        """Modules whose rows were copied together for routing, and why; a packed pool's are used where they stand if they can be."""
        return {site.path: site.copied for site in self.sites if site.copied}

    def attach(self) -> None:
        """Does nothing if it is attached: hooks that stand twice would add every update twice."""
        if self._handles:
            return
        self.model.__dict__[ATTRIBUTE] = self
        self._handles = self.streams.attach()
        self._handles += [
            site.module.register_forward_hook(site.hook, with_kwargs=True) for site in self.sites
        ]
        for site in self.sites:
            if site.source is not None and site.stack.residual is not None:
                self._handles += follow_residual(site.source, site.module, site.stack.residual)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Site:
    """Routing at one module."""

    def __init__(self, routing: Routing, path: str, module: nn.Module, pool: Pool):
        self.routing, self.path, self.module = routing, path, module
        members = [i for i, e in enumerate(pool.experts) if path in e.updates]
        self.embedding = pool.experts[members[0]].updates[path].embedding
        d_in, d_out = shape_of(module, self.embedding)
        parts: list[Update | None] = []
        for i in members:
            update = pool.experts[i].updates[path]
            needs_weight = update.magnitude is not None
            parts.append(update.resolved(dense_weight(module, path)) if needs_weight else update)
        gates = [(pool.experts[i].gates or {}).get(path) for i in members]
        if routing.ready.offers_null and len(members) < len(pool.experts):
            members.append(-1)
            parts.append(None)
            gates.append(None)
        self.members = tuple(members)
        dtype = routing.dtype or compute_dtype(module, routing.model)
        rows, self.copied = pool.rows(path, dtype)
        null = (0,) * (len(parts) - len(rows.starts)) if rows is not None else ()
        there = None if rows is None else (rows.A, rows.B, rows.starts + null)
        self.stack: Stack = make_stack(parts, d_in, d_out, dtype, there)
        if rows is not None and rows.file_bytes > routing.memory // 2:
            self.stack = replace(self.stack, ahead=True)
        names = [pool.experts[i].name for i in members if i >= 0]
        check_finite_stack(self.stack, names, path, mapped=there is not None)
        self.layer = None if self.stack.low_rank_only else layer_of(module)
        self.source = residual_source(routing.model, parts)
        # An embedding's input is a token's number, which has no direction: its gates read its output.
        length = d_out if self.embedding else d_in
        self.candidates = Candidates(path, pool.names, self.members, tuple(gates), length, tuple(parts))
        self.router: BoundRouter = routing.ready.bind(self.candidates)
        self._by_gates = self.router.by_gates
        self.prepare()
        self.fresh = is_plain(module)

    def prepare(self) -> None:
        """What the backend makes once of the stack, where the stack is."""
        self.fused: Prepared | None = None
        if self.routing.device_memory is not None and self._by_gates is None:
            raise RoutingError(
                f"{type(self.routing.router).__name__} doesn't choose by gates, and with device_memory only gates are looked at: "
                "leave device_memory out, or use PHATGOOSE."
            )
        if self.routing.device_memory is not None and self._by_gates is not None and cacheable(self.stack):
            self.fused = Cached(*self._by_gates, self.stack, self.layer, self.routing.ops.mix, self.path)
        elif self.routing.ops.fuse is not None and self._by_gates is not None and not self.embedding:
            self.fused = self.routing.ops.fuse(*self._by_gates, self.stack, self.layer)
        # It can write its choices where a trace wants them.
        self.writer = self.fused if isinstance(self.fused, Fused) and self.fused.plain else None

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        u = read_from = given(args, kwargs)
        cached = isinstance(self.fused, Cached)
        if self.stack.A.device != output.device and not cached:
            self.stack = self.stack.to(output.device)
            self.prepare()
        fused = None if self.router.by_gates is None else self.fused
        writable = self.fresh and unseen(module)
        if cached and fused is None:
            raise RoutingError(
                f"{self.path}: experts can't be switched off with device_memory. Leave it out."
            )
        recorder, done = self.routing.recorder, None
        if fused is not None and recorder is None:
            done = fused(u, output, writable)
        elif (
            recorder is not None
            and not recorder.wants_scores
            and fused is not None
            and fused is self.writer
            and not isinstance(module, Slot)
        ):
            room = recorder.room(
                self.writer.chosen, self.path, self.members, u, output.shape, self.routing.streams
            )
            done = self.writer(u, output, writable, room.next())
            if done is not None:
                room.paths[self.path] = None
        if done is not None:
            return done
        # With offloading the module's input may still be where the last module left it.
        u = u.to(output.device)
        context = context_at(self.path, module, args, read_from, output.shape, self.routing.streams)
        if fused is not None and fused.can(u, output):  # so that recording changes nothing
            done, chosen, weights = fused.with_choice(u, output)
            self._record(context, u, chosen, weights)
            return done
        y = output.reshape(-1, output.shape[-1])
        flat = u.reshape(-1) if self.embedding else u.reshape(-1, u.shape[-1])
        read = y if self.embedding else flat
        chosen, weights = self.router(read, context, self.routing.ops)
        self._record(context, read, chosen, weights)
        mixed = self.routing.ops.mix(flat, y, self.stack, chosen, weights, self.layer)
        return mixed.reshape(output.shape)

    def _record(self, context: RoutingContext, read: Tensor, chosen: Tensor, weights: Tensor) -> None:
        if (recorder := self.routing.recorder) is None:
            return
        scores = None
        if recorder.wants_scores:
            flat = read.reshape(-1, read.shape[-1])
            if isinstance(self.fused, Cached):  # all gates are on the host
                flat = flat.to(self.stack.A.device)
            scores = self.router.scores(flat, context, self.routing.ops)
            scores = None if scores is None else scores.to(read.device)
        recorder.record(context, self.members, chosen, weights, scores)
