"""Attach routing to a model, and take it off again.

A forward hook on each adapted module adds Σ w_e Δ_e(u) to the module's own output. Modules, parameter names and the
state dict stay as they are, so generate(), save_pretrained(), device_map and quantised bases go on working.
"""

from __future__ import annotations

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import check_same_base
from phatgoose.memory import available_bytes
from phatgoose.models.attach.device_memory import Budget
from phatgoose.models.attach.hooks import Hooks, forget_compiled
from phatgoose.models.attach.idle_modules import IdleModuleCheck
from phatgoose.models.attach.modules import check_copies, check_parameters, module_at
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.attach.placement import pool_on_model
from phatgoose.models.attach.reference_text import calibrate
from phatgoose.models.attach.site import RoutingState, Site
from phatgoose.models.base.base import Base, unwrap_model
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.layers import track_residual
from phatgoose.models.context.prompted import ATTRIBUTE, setup_of
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.names import modules_by_path
from phatgoose.models.moe.pool import unify_names
from phatgoose.models.trace.recorder import Recorder
from phatgoose.ops import backend
from phatgoose.ops.offload.experts import OffloadedExperts
from phatgoose.records import Fingerprint
from phatgoose.routers import PHATGOOSE, Router


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
    """Attaches routing to a model and returns the same model object. An earlier routing is replaced.

    Code that torch.compile has compiled is compiled again at the next call.

    Args:
        model: the base that the pool's experts were trained on.
        pool: the experts.
        router: chooses the experts; None: PHATGOOSE(top_k=2).
        backend_name: "auto"; "cpu" (a compiled kernel) or "triton" (GPUs), both for inference only; "torch"; or
            "reference".
        dtype: the dtype in which the experts' matrices are kept and multiplied; None: that of each module. float32 on a
            bfloat16 base avoids rounding the experts, as PEFT does, at twice the memory.
        any_base: skip the check that `model` is the pool's base, for a base that is known to be a variant of it.
        device_memory: bytes, or "8GB": how much of the devices' memory the pool may take. Quantised gates are then kept
            there, experts are copied there when they are needed, and everything else stays on the host (`cache_use` has
            the counts). Choices are the same. None: as much as the pool needs.

    Raises:
        BaseModelError: `model` is not the base that the pool records, or no transformers model (e.g. an exported
            program).
        RoutingError: a module is missing or has another shape, or the router can't serve this pool, or not with so
            little memory.
    """
    return route_with(model, pool, router, RouteOptions(backend_name, dtype, any_base, device_memory))


def route_with(
    model: Base | PreTrainedModel, pool: Pool, router: Router | None, options: RouteOptions
) -> PreTrainedModel:
    """`route`, with its keywords as one object."""
    bare = unwrap_model(model)
    router = PHATGOOSE() if router is None else router
    check_base(model, pool, options)
    router.check(pool.names)
    routing = Routing(bare, pool, router, options)  # raises before anything is attached
    _calibrate(model, routing)
    earlier = routing_of(bare)
    unroute(bare)
    try:
        routing.attach()
    except BaseException:
        if earlier is not None:
            earlier.attach()
        raise
    return bare if isinstance(model, Base) else model


def check_base(model: Base | PreTrainedModel, pool: Pool, options: RouteOptions) -> None:
    """Raises BaseModelError if the model is not the base that the pool records, unless the options allow any."""
    if not options.any_base and pool.base is not None:
        check_same_base(pool.base, _fingerprint(model), "the pool's experts")


def _calibrate(model: Base | PreTrainedModel, routing: Routing) -> None:
    """Shows the reference text to routers that need it, on the base alone."""
    routers = [(site, site.router) for site in routing.sites if site.router.needs_reference]
    if not routers:
        return
    bare, earlier = routing.model, routing_of(model)
    base = model if isinstance(model, Base) else bare.__dict__.get("_phatgoose_base")
    if base is None:
        raise RoutingError(
            f"{type(routing.router).__name__} compares scores on reference text, for which it needs the tokenizer: "
            "pass the Base."
        )
    if earlier is not None:
        earlier.detach()
    try:
        calibrate(bare, base.tokenizer, routers, routing.ops)
    finally:
        if earlier is not None:
            earlier.attach()


def _fingerprint(model: Base | PreTrainedModel) -> Fingerprint:
    if isinstance(model, Base):
        return model.fingerprint
    bare = unwrap_model(model)
    known = bare.__dict__.get("_phatgoose_base")
    if known is not None:
        return known.fingerprint
    return fingerprint(bare, bare.name_or_path or type(bare).__name__)


def unroute(model: Base | PreTrainedModel) -> PreTrainedModel:
    """Takes routing off; the model's outputs are bit for bit what they were before. Does nothing if there is none."""
    bare = unwrap_model(model)
    routing = bare.__dict__.pop(ATTRIBUTE, None)
    if routing is not None:
        routing.detach()
    return bare if isinstance(model, Base) else model


def routing_of(model: Base | PreTrainedModel) -> Routing | None:
    """The routing attached to a model, or None."""
    return unwrap_model(model).__dict__.get(ATTRIBUTE)


class Routing(RoutingState):
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
        modules = modules_by_path(model, pool.modules)
        pool, self.renamed = pool_on_model(model, modules, pool)
        check_copies(modules, pool.experts)
        check_parameters(modules, pool.experts)
        if (named := unify_names(model, pool, modules)) is not pool:
            pool, modules = named, modules_by_path(model, named.modules)
        self.model, self.pool, self.router = model, pool, router
        self.memory = available_bytes()
        self.prepared_router = router.prepared(setup_of(model, pool))
        self.streams = Streams(model, reads_text=router.reads == "texts")
        self._hooks = Hooks()
        self._idle_check: IdleModuleCheck | None = None
        self.sites = [Site(self, path, module_at(modules, path, pool)) for path in pool.modules]
        self.budget: Budget | None = None
        if options.device_bytes is not None:
            offloaded = [site.fused for site in self.sites if isinstance(site.fused, OffloadedExperts)]
            whole = [site.device_bytes for site in self.sites if not isinstance(site.fused, OffloadedExperts)]
            self.budget = Budget(offloaded, whole, options.device_bytes)
        pool.release_gates()

    @property
    def copied(self) -> dict[str, str]:
        """Modules of a packed pool whose rows couldn't be used where they are mapped and were copied, and why."""
        return {site.path: site.copied for site in self.sites if site.copied}

    def attach(self) -> None:
        """Puts the hooks on. Does nothing if they are on: a second hook would add every update again."""
        if self._hooks:
            return
        self.record(None)
        try:
            self._hooks.add(self.streams.attach())
            for site in self.sites:
                self._hooks.add(self._attach_site(site))
            # Only once: when routing comes back, its modules have been watched before.
            if self._idle_check is None:
                modules = [(site.path, site.module) for site in self.sites]
                self._idle_check = IdleModuleCheck(self.model, modules, self.streams)
                self._idle_check.attach()
        except BaseException:
            self.detach()
            raise
        self.model.__dict__[ATTRIBUTE] = self

    def _attach_site(self, site: Site) -> list[RemovableHandle]:
        hook = site.hook if site.one_operator else site.eager_hook
        handles = [site.module.register_forward_hook(hook, with_kwargs=True)]
        if site.source is not None and site.stack.residual is not None:
            handles += track_residual(site.source, site.module, site.stack.residual)
        return handles

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
