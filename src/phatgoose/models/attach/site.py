"""Routing at one module: its experts' stack, its router, and the hook that adds what they do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.device_memory import cacheable
from phatgoose.models.attach.fits import check_finite_stack
from phatgoose.models.attach.hooks import apart
from phatgoose.models.attach.modules import shape_of
from phatgoose.models.base.layers import (
    ModuleLayer,
    compute_dtype,
    first_argument,
    is_plain_linear,
    may_modify_output,
    residual_source,
    resolve_update,
    weight_state,
)
from phatgoose.models.moe.expert_linear import ExpertLinear, routing_context
from phatgoose.ops import Fused, Prepared, Stack, make_stack
from phatgoose.ops.bottleneck import Residual
from phatgoose.ops.offload.experts import Cached
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Candidates

if TYPE_CHECKING:
    from phatgoose.models.attach.attach import Routing


class Site:
    """Routing at one module."""

    def __init__(self, routing: Routing, path: str, module: nn.Module, pool: Pool):
        self.routing, self.path, self.module = routing, path, module
        members = [i for i, e in enumerate(pool.experts) if path in e.updates]
        self._updates = [pool.experts[i].updates[path] for i in members]
        self._gates = [(pool.experts[i].gates or {}).get(path) for i in members]
        self.embedding = self._updates[0].embedding
        self._reads_weight = any(update.magnitude is not None for update in self._updates)
        if routing.ready.offers_null and len(members) < len(pool.experts):
            members.append(-1)
        self.members = tuple(members)
        self.source = residual_source(routing.model, self._updates)
        self._residual = Residual()  # hooks fill it, so a stack that is made anew must read the same
        self.layer = ModuleLayer(module)
        self.fresh = is_plain_linear(module)
        self.fused: Prepared | None = None
        self._stack()
        self.bind()
        self.prepare()

    def _stack(self) -> None:
        """Stacks the updates for the module as it is now."""
        module, pool, routing = self.module, self.routing.pool, self.routing
        d_in, d_out = shape_of(module, self.embedding)
        self._weight = weight_state(module) if self._reads_weight else None
        self.dtype = routing.dtype or compute_dtype(module, routing.model)
        null = (None,) * self.members.count(-1)
        self._parts = (*(resolve_update(update, module, self.path) for update in self._updates), *null)
        rows, self.copied = pool.rows(self.path, self.dtype)
        there = None if rows is None else (rows.A, rows.B, (*rows.starts, *(0 for _ in null)))
        self.stack: Stack = make_stack(self._parts, d_in, d_out, self.dtype, there, self._residual)
        if rows is not None and rows.file_bytes > routing.memory // 2:
            self.stack = replace(self.stack, prefetch=True)
        names = [pool.experts[i].name for i in self.members if i >= 0]
        check_finite_stack(self.stack, names, self.path, mapped=there is not None)
        self._at: tuple[torch.device, torch.dtype] = self.stack.A.device, compute_dtype(module, routing.model)

    def bind(self) -> None:
        """Binds the router to the experts as they act here."""
        d_in, d_out = shape_of(self.module, self.embedding)
        gates = (*self._gates, *(None for m in self.members if m < 0))
        # An embedding's input is a token's number, which has no direction: its gates read its output.
        length, names = d_out if self.embedding else d_in, self.routing.pool.names
        self.candidates = Candidates(self.path, names, self.members, gates, length, self._parts)
        self.router: BoundRouter = self.routing.ready.bind(self.candidates)
        self._by_gates = self.router.by_gates

    def prepare(self) -> None:
        """What the backend makes once of the stack, where the stack is."""
        routing, layer = self.routing, None if self.stack.low_rank_only else self.layer
        self.fused = None
        if routing.device_memory is not None and self._by_gates is None:
            raise RoutingError(
                f"{type(routing.router).__name__} doesn't choose by gates, and with device_memory only gates are looked at: "
                "leave device_memory out, or use PHATGOOSE."
            )
        if routing.device_memory is not None and self._by_gates is not None and cacheable(self.stack):
            self.fused = Cached(*self._by_gates, self.stack, layer, routing.ops.mix, self.path)
        elif routing.ops.fuse is not None and self._by_gates is not None and not self.embedding:
            self.fused = routing.ops.fuse(*self._by_gates, self.stack, layer)
        # It can write its choices where a trace wants them.
        self.writer = self.fused if isinstance(self.fused, Fused) and self.fused.plain else None

    @property
    def one_operator(self) -> bool:
        """Whether all of it is one call that torch.compile can keep in its graph; else it runs between two graphs."""
        fixed = "by_gates" in vars(self.router)  # not one that changes with switches
        return (
            fixed
            and self.fused is not None
            and not isinstance(self.fused, Cached)
            and self.stack.low_rank_only
            and not isinstance(self.module, ExpertLinear)
        )

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            return self._routed(module, args, kwargs, output)
        if self.routing.recorder is None and self._at == (output.device, output.dtype) and self.one_operator:
            assert self.fused is not None
            done = self.fused(first_argument(args, kwargs), output, self.fresh and may_modify_output(module))
            if done is not None:
                return done
        return self.apart(module, args, kwargs, output)

    def apart(self, *call: Any) -> Tensor:
        """The hook, between two graphs where torch.compile compiles what is around it."""
        done: Tensor = apart(self._routed, *call)
        return done

    def _routed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not isinstance(output, Tensor) or torch.jit.is_tracing():
            self._refuse(output)
        u = read_from = first_argument(args, kwargs)
        if self._at != (output.device, output.dtype) or self._reads_weight:
            self._follow(output)
        fused = None if self.router.by_gates is None else self.fused
        writable = self.fresh and may_modify_output(module)
        recorder, done = self.routing.recorder, None
        if fused is not None and recorder is None:
            done = fused(u, output, writable)
        elif (
            recorder is not None
            and not recorder.wants_scores
            and fused is not None
            and fused is self.writer
            and not isinstance(module, ExpertLinear)
        ):
            room = recorder.room(
                self.writer.chosen, self.path, self.members, u, output.shape, self.routing.streams
            )
            if room is not None:
                done = self.writer(u, output, writable, room.next())
            if room is not None and done is not None:
                room.paths[self.path] = None
        if done is not None:
            return done
        context = routing_context(self.path, module, args, read_from, output.shape, self.routing.streams)
        return self._in_steps(context, u, output, fused)

    def _in_steps(self, context: RoutingContext, u: Tensor, output: Tensor, fused: Prepared | None) -> Tensor:
        if fused is None and isinstance(self.fused, Cached):
            raise RoutingError(
                f"{self.path}: experts can't be switched off with device_memory. Leave it out."
            )
        # With offloading the module's input may still be where the last module left it.
        u = u.to(output.device)
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

    def _follow(self, output: Tensor) -> None:
        """Makes the stack anew where the module has changed since: it was moved, cast, or given other weights."""
        state = weight_state(self.module) if self._reads_weight else None
        changed = state is not None and state != self._weight
        dtype = self.routing.dtype or compute_dtype(self.module, self.routing.model)
        if changed or dtype != self.dtype:
            if self.routing.device_memory is not None:
                raise RoutingError(
                    f"{self.path} has other weights, or another dtype, than when it was routed with device_memory: route it again."
                )
            self._stack()
            if not self.router.needs_reference:  # what it has observed would be lost
                self.bind()
            self.prepare()
        if self.stack.A.device != output.device and not isinstance(self.fused, Cached):
            self.stack = self.stack.to(output.device)
            self.prepare()
        self._at = output.device, output.dtype

    def _refuse(self, output: Any) -> None:
        """Says why this call can't be routed. What is attached is taken off if it never can."""
        if torch.jit.is_tracing():
            raise RoutingError(
                "torch.jit.trace would keep the choice of experts that its example makes, for all inputs: a routed model can't be traced. "
                "Unroute it first, or use torch.compile."
            )
        self.routing.detach()
        self.routing.model.__dict__.pop("_phatgoose_routing", None)
        raise RoutingError(
            f"{self.path} is a {type(self.module).__name__} that returns a {type(output).__name__}, to which no update can be added: "
            "it can't be routed. The routing was taken off; use experts that leave it out."
        )

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
