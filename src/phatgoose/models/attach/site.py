"""Routing at one module, `Site`, and at all modules of a model, `Routing`.

The hook leaves by one of these exits, in this order:

1. refused: the output is no tensor, or torch.jit.trace is tracing;
2. chosen for the whole pass: the router has chosen before, once for all modules, and the backend mixes;
3. fused: gate scores, choice and mix in one call that the backend prepared (`FusedRouting`), if nobody records;
4. fused and recorded: the same, and the kernel writes its choices straight into the recorder's buffer;
5. fused with its choice: the same call also returns the choice, which is handed to the recorder;
6. in three steps: the router chooses, the backend mixes.

Under torch.compile a fused call that the compiler can keep in its graph is made there; everything else runs between
two graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.memory import available_bytes
from phatgoose.models.attach.candidates import candidates_at, stacked
from phatgoose.models.attach.hooks import Hooks, forget_compiled, run_eagerly
from phatgoose.models.attach.idle_modules import IdleModuleCheck
from phatgoose.models.attach.modules import check_copies, check_parameters, module_at, pool_on_model, shape_of
from phatgoose.models.attach.options import Budget, RouteOptions
from phatgoose.models.base.base import known_base
from phatgoose.models.base.layers import (
    ModuleLayer,
    compute_dtype,
    first_argument,
    is_plain_linear,
    may_modify_output,
    residual_source,
    resolve_update,
    track_residual,
    weight_state,
)
from phatgoose.models.base.module_names import layer_and_kind
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.expert_linear import ExpertLinear, routing_context
from phatgoose.models.moe.names import modules_by_path, unify_names
from phatgoose.models.text.encoding import decode_text
from phatgoose.models.text.markup import markup_of
from phatgoose.models.trace.recorder import Recorder
from phatgoose.ops import CpuRouting, FusedRouting, Stack, backend
from phatgoose.ops.backends import GivenMix
from phatgoose.ops.bottleneck import Residual
from phatgoose.ops.offload.experts import OffloadedExperts
from phatgoose.routers import Router
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, Encoder, Place, Setup

ATTRIBUTE = "_phatgoose_routing"
"""The key in a model's `__dict__` of the routing that is attached to it."""


class Site:
    """Routing at one module."""

    def __init__(self, routing: Routing, path: str, module: nn.Module):
        self.routing, self.path, self.module = routing, path, module
        self._pool_candidates = candidates_at(routing.pool, path, routing.prepared_router.offers_null)
        self.members = self._pool_candidates.members
        updates = [update for update in self._pool_candidates.updates if update is not None]
        self.embedding = updates[0].embedding
        self._reads_weight = any(update.magnitude is not None for update in updates)
        self.source = residual_source(routing.model, updates)
        # Hooks write the residual stream here, so a stack that is made anew must read from the same object.
        self._residual = Residual()
        self.layer = ModuleLayer(module)
        self.plain = is_plain_linear(module)
        self._make_stack()
        self.bind()
        self.prepare()

    def _make_stack(self) -> None:
        """Stacks the updates for the module as it is now."""
        module, routing = self.module, self.routing
        sizes = shape_of(module, self.embedding)
        self._weight = weight_state(module) if self._reads_weight else None
        self.dtype = routing.options.dtype or compute_dtype(module, routing.model)
        listed = self._pool_candidates
        updates = tuple(u if u is None else resolve_update(u, module, self.path) for u in listed.updates)
        self.candidates = replace(listed, updates=updates, d_in=sizes[self.embedding])
        stack, file_bytes, self.copied = stacked(
            routing.pool, self.candidates, sizes, self.dtype, self._residual
        )
        # Of a packed pool that may not fit into memory, chosen rows are asked for before they are read.
        self.stack: Stack = replace(stack, prefetch=True) if file_bytes > routing.memory // 2 else stack
        # The module's device and compute dtype that the stack was made or moved for.
        self._stack_for = stack.A.device, compute_dtype(module, routing.model)

    def bind(self) -> None:
        """Binds the router to the experts as they act here."""
        self.router: BoundRouter = self.routing.prepared_router.bind(self.candidates)
        self._by_gates = self.router.by_gates

    def prepare(self) -> None:
        """Has the backend prepare its fused call, on the stack's device."""
        routing, by_gates, stack = self.routing, self._by_gates, self.stack
        offloads = routing.options.device_memory is not None
        if offloads and by_gates is None:
            raise RoutingError(
                f"{type(routing.router).__name__} doesn't choose by gates, and with device_memory only gates are "
                "looked at: leave device_memory out, or use PHATGOOSE."
            )
        self.fused: FusedRouting | None = None
        if by_gates is not None and offloads and not stack.embedding and not stack.bottlenecks:
            layer = None if stack.low_rank_only else self.layer
            self.fused = OffloadedExperts(*by_gates, stack, layer, routing.ops.mix, self.path)
        else:
            self.fused = self.fuse(by_gates)
        given = routing.ops.given if self.router.whole_passes and not offloads else None
        self.given = None if given is None else given(stack, self.layer)
        # Only this kernel can write its choices into a recorder's buffer.
        self.writer = self.fused if isinstance(self.fused, CpuRouting) and self.fused.plain else None

    def fuse(self, by_gates: tuple[Tensor, int] | None) -> FusedRouting | None:
        """The backend's fused call for a router that goes by these gates; None if it can't make one."""
        fuse, stack = self.routing.ops.fuse, self.stack
        if fuse is None or by_gates is None or self.embedding or len(by_gates[0]) != stack.experts:
            return None
        return fuse(*by_gates, stack, None if stack.low_rank_only else self.layer)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device if nothing is offloaded: the stack, and the gates in float32."""
        stack = self.stack
        tensors = [stack.A, stack.B, *stack.other_tensors()]
        if self._by_gates is not None:
            tensors.append(self._by_gates[0])
        return sum(t.nbytes for t in tensors)

    @property
    def one_operator(self) -> bool:
        """Whether all of it is one call that torch.compile can keep in its graph; else it runs between two graphs."""
        # An attribute of the instance is fixed; a property may change, as with experts that are switched off.
        fixed = "by_gates" in vars(self.router)
        return (
            fixed
            and self.fused is not None
            and not isinstance(self.fused, OffloadedExperts)
            and self.stack.low_rank_only
            and not isinstance(self.module, ExpertLinear)
        )

    def attach(self) -> Iterator[RemovableHandle]:
        """Puts the hooks of this module on, one as each is taken."""
        hook = self.hook if self.one_operator else self.eager_hook
        yield self.module.register_forward_hook(hook, with_kwargs=True)
        yield from self.track_residual()

    def track_residual(self) -> list[RemovableHandle]:
        """Puts the hooks on that hand the residual stream to updates that read it. After the module's own hook."""
        if self.source is None or self.stack.residual is None:
            return []
        return track_residual(self.source, self.module, self.stack.residual)

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """The forward hook, where the call may become part of a compiled graph."""
        if not torch.compiler.is_compiling():
            return self._routed(module, args, kwargs, output)
        # In a graph nothing may be looked up or noted, so only the plain case stays there. Where the module has moved
        # since (`_stack_for`), the stack must follow it first.
        if (
            self.routing.recorder is None
            and self._stack_for == (output.device, output.dtype)
            and self.one_operator
        ):
            assert self.fused is not None
            done = self.fused(first_argument(args, kwargs), output, self.plain and may_modify_output(module))
            if done is not None:
                return done
        return self.eager_hook(module, args, kwargs, output)

    def eager_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """The hook between two graphs, where torch.compile compiles what is around it."""
        if not torch.compiler.is_compiling():
            return self._routed(module, args, kwargs, output)
        return run_eagerly(self._routed, module, args, kwargs, output)

    def _routed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        # Exit 1. Some modules return tuples; a traced graph would freeze the choice that its example makes.
        if not isinstance(output, Tensor) or torch.jit.is_tracing():
            self._refuse(output)
        u = first_argument(args, kwargs)
        # `weight_state` changes with every write into a weight that DoRA's norms were taken of, so it is compared at
        # each call.
        if self._stack_for != (output.device, output.dtype) or self._reads_weight:
            self._follow(output)
        recorder = self.routing.recorder
        if self.given is not None and recorder is None:
            done = self._whole_pass(self.given, module, u, output)  # exit 2
            if done is not None:
                return done
        # A router whose experts can be switched off has no gates to fuse while some are off.
        fused = None if self.router.by_gates is None else self.fused
        # The output may be written into only if the module made it in this call and no other hook can hold it.
        writable = self.plain and may_modify_output(module)
        done = None
        if fused is not None and recorder is None:
            # Exit 3, the usual one. A backend may still decline a call (None): gradients, another dtype.
            done = fused(u, output, writable)
        elif fused is not None and fused is self.writer and not isinstance(module, ExpertLinear):
            # Exit 4. Not for a mixture's experts: the buffer is for modules that see all tokens, and theirs are picked.
            done = self._write_choices(recorder, u, output, writable)
        if done is not None:
            return done

        if fused is None and isinstance(self.fused, OffloadedExperts):
            raise RoutingError(
                f"{self.path}: experts can't be switched off with device_memory. Leave it out."
            )

        # Of `u` as the module got it: whose tokens it reads is told by its memory, which changes with the device.
        context = routing_context(self.path, module, args, u, output.shape, self.routing.streams)
        # With offloading the module's input may still be where the last module left it.
        u = u.to(output.device)
        done, chosen, weights = self.mix(self.router, fused, u, output, context)
        if recorder is not None:
            self._record(recorder, context, output if self.embedding else u, chosen, weights)
        return done

    def _whole_pass(self, given: GivenMix, module: nn.Module, u: Tensor, output: Tensor) -> Tensor | None:
        """The output with what the router chose for the whole pass; None if that can't be told, or done, so quickly."""
        memory = self.routing.streams.memory_of_whole(self.path, output.shape)
        if memory is None:
            return None
        choice = self.router.in_whole_pass(u, memory, self.routing.ops)
        if choice is None:
            return output
        return given(u, output, choice, self.plain and may_modify_output(module))

    def _write_choices(
        self, recorder: Recorder | None, u: Tensor, output: Tensor, writable: bool
    ) -> Tensor | None:
        """The fused call, whose kernel writes its choices where the recorder keeps them; None if it can't."""
        # Scores aren't among what the kernel writes.
        if recorder is None or recorder.wants_scores or self.writer is None:
            return None
        streams = self.routing.streams
        buffer = recorder.buffer(self.writer.top_k, self.path, self.members, u, output.shape, streams)
        if buffer is None:
            return None
        done = self.writer(u, output, writable, buffer.next())
        if done is not None:
            buffer.wrote(self.path)
        return done

    def mix(
        self,
        router: BoundRouter,
        fused: FusedRouting | None,
        u: Tensor,
        y: Tensor,
        context: RoutingContext,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y + Σ w Δ(u) for this module's inputs u and outputs y, the choice, int64 [N, k], and its weights [N, k]."""
        # Exit 5: the same kernel as without a recorder, so that recording changes no bit of the output.
        if fused is not None and fused.can(u, y):
            return fused.with_choice(u, y)
        # Exit 6. The router contract is about [N, d], whatever shape the module works on; an embedding's router reads
        # its output, as its input is a token's number.
        flat_u = u.reshape(-1) if self.embedding else u.reshape(-1, u.shape[-1])
        flat_y, ops = y.reshape(-1, y.shape[-1]), self.routing.ops
        chosen, weights = router(flat_y if self.embedding else flat_u, context, ops)
        if not router.acts:
            return y, chosen, weights
        mixed = ops.mix(flat_u, flat_y, self.stack, chosen, weights, self.layer)
        return mixed.reshape(y.shape), chosen, weights

    def _follow(self, output: Tensor) -> None:
        """Makes a new stack if the module was moved, cast, or given other weights since."""
        state = weight_state(self.module) if self._reads_weight else None
        changed = state is not None and state != self._weight
        dtype = self.routing.options.dtype or compute_dtype(self.module, self.routing.model)
        if changed or dtype != self.dtype:
            if self.routing.options.device_memory is not None:
                raise RoutingError(
                    f"{self.path} has other weights, or another dtype, than when it was routed with device_memory: "
                    "route it again."
                )
            self._make_stack()
            # A router that was shown the reference text keeps what it has observed.
            if not self.router.needs_reference:
                self.bind()
            self.prepare()
        if self.stack.A.device != output.device and not isinstance(self.fused, OffloadedExperts):
            self.stack = self.stack.to(output.device)
            self.prepare()
        self._stack_for = output.device, output.dtype

    def _refuse(self, output: Any) -> None:
        """Raises RoutingError: this call can't be routed. The routing is taken off if no call of the module can."""
        if torch.jit.is_tracing():
            raise RoutingError(
                "torch.jit.trace would keep the choice of experts that its example makes, for all inputs: a routed "
                "model can't be traced. Unroute it first, or use torch.compile."
            )
        self.routing.detach()
        self.routing.model.__dict__.pop(ATTRIBUTE, None)
        raise RoutingError(
            f"{self.path} is a {type(self.module).__name__} that returns a {type(output).__name__}, to which no "
            "update can be added: it can't be routed. The routing was taken off; use experts that leave it out."
        )

    def _record(
        self, recorder: Recorder, context: RoutingContext, read: Tensor, chosen: Tensor, weights: Tensor
    ) -> None:
        """Hands a choice to the recorder, with scores if it wants them."""
        scores = None
        if recorder.wants_scores:
            flat = read.reshape(-1, read.shape[-1])
            # With offloading all gates are on the host.
            if isinstance(self.fused, OffloadedExperts):
                flat = flat.to(self.stack.A.device)
            scores = self.router.scores(flat, context, self.routing.ops)
            scores = None if scores is None else scores.to(read.device)
        recorder.record(context, self.members, chosen, weights, scores)


class Routing:
    """A pool and a router, bound to the modules of one model.

    device: the one that the backend is chosen for; None: that of the model's first weight.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pool,
        router: Router,
        options: RouteOptions | None = None,
        device: torch.device | None = None,
    ):
        self.options = options = RouteOptions() if options is None else options
        self.ops = backend(options.backend, (model.device if device is None else device).type)
        pool, modules, self.renamed = placed_pool(model, pool)
        self.model, self.pool, self.router = model, pool, router
        # Bytes of memory that were free before the stacks were made.
        self.memory = available_bytes()
        self.streams = Streams(model, router.reads == "texts", router.remembers)
        self.prepared_router = router.prepared(self.setup())
        self.recorder: Recorder | None = None
        self._hooks = Hooks()
        self._idle_check: IdleModuleCheck | None = None
        self.sites = [Site(self, path, module_at(modules, path, pool)) for path in pool.modules]
        self.budget: Budget | None = None
        if options.device_memory is not None:
            offloaded = [site.fused for site in self.sites if isinstance(site.fused, OffloadedExperts)]
            whole = [site.device_bytes for site in self.sites if not isinstance(site.fused, OffloadedExperts)]
            self.budget = Budget(offloaded, whole, int(options.device_memory))
        pool.release_gates()

    @property
    def copied(self) -> dict[str, str]:
        """Modules of a packed pool whose rows couldn't be used where they are mapped and were copied, and why."""
        return {site.path: site.copied for site in self.sites if site.copied}

    def setup(self) -> Setup:
        """What a router may look at before it is bound."""
        return setup_of(self.model, self.pool, self.streams)

    def attach(self) -> None:
        """Puts the hooks on. Does nothing if they are on: a second hook would add every update again."""
        if self._hooks:
            return
        self.record(None)
        try:
            self._hooks.add(self.streams.attach())
            for site in self.sites:
                self._hooks.add(site.attach())
            # Only once: when routing comes back, its modules have been watched before.
            if self._idle_check is None:
                modules = [(site.path, site.module) for site in self.sites]
                self._idle_check = IdleModuleCheck(self.model, modules, self.streams)
        except BaseException:
            self.detach()
            raise
        self.model.__dict__[ATTRIBUTE] = self

    def detach(self) -> None:
        """Takes all hooks off the model."""
        self._hooks.remove()
        if self._idle_check is not None:
            self._idle_check.hooks.remove()

    def record(self, recorder: Recorder | None) -> None:
        """Passes every choice to this recorder from now on; None: to none."""
        self.recorder = recorder
        self.streams.asked = recorder is not None or not all(site.one_operator for site in self.sites)
        forget_compiled()


def placed_pool(
    model: PreTrainedModel, pool: Pool
) -> tuple[Pool, dict[str, nn.Module], dict[str, dict[str, str]]]:
    """(the pool under the model's names of its modules, these modules, what was renamed as `pool_on_model` says).

    Raises:
        RoutingError: an expert's weights, or the names of its modules, don't go with this model.
    """
    modules = modules_by_path(model, pool.modules)
    pool, renamed = pool_on_model(model, modules, pool)
    check_copies(modules, pool.experts)
    check_parameters(modules, pool.experts)
    if (named := unify_names(model, pool, modules)) is not pool:
        pool, modules = named, modules_by_path(model, named.modules)
    return pool, modules, renamed


def setup_of(model: PreTrainedModel, pool: Pool, streams: Streams) -> Setup:
    """What a router may look at before it is bound. pool: as `placed_pool` returns it."""
    base, signature = known_base(model), pool.experts[0].signature

    def encoder(name: str) -> Encoder:
        from phatgoose.models.base.sentence_encoder import load_encoder

        expected = None if signature is None else signature.encoder_sha256
        return load_encoder(name, str(model.device) if model.device.type == "cuda" else "cpu", expected)

    decode = None if base is None else partial(decode_text, base.tokenizer)
    markup = None if base is None else partial(markup_of, base.tokenizer)
    paths = pool.modules
    places = {
        path: Place(streams.stack_of(path), block)
        for path, (block, _) in zip(paths, layer_and_kind(paths), strict=True)
    }
    return Setup(pool.experts, decode, encoder, places, markup, tuple(streams.stacks))
