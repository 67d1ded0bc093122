"""Attach routing to a model, and take it off again.

A forward hook on each adapted module adds Σ w_e Δ_e(u) to the module's own output. Modules, parameter names and the state
dict stay as they are, so generate(), save_pretrained(), device_map and quantised bases go on working.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import check_same_base
from phatgoose.memory import available_bytes
from phatgoose.models.attach.device_memory import Budget, parse_bytes
from phatgoose.models.attach.hooks import Hooks, forget_compiled
from phatgoose.models.attach.modules import check_copies, check_parameters, module_at
from phatgoose.models.attach.placement import placed_pool
from phatgoose.models.attach.reference_text import show_reference
from phatgoose.models.attach.site import Site
from phatgoose.models.attach.unrun import Unrun
from phatgoose.models.base.base import Base, unwrap_model
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.layers import track_residual
from phatgoose.models.context.prompted import ATTRIBUTE, setup_of
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.models.moe.names import modules_by_path
from phatgoose.models.moe.pool import unify_names
from phatgoose.models.trace.recorder import Recorder
from phatgoose.ops import Backend, backend
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
    """Attaches routing and returns the same model object; an earlier routing is replaced. What torch.compile has compiled is compiled anew.

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
        BaseModelError: `model` is not the base the pool records, or no transformers model, as an exported program.
        RoutingError: a module is missing or of another shape, the router can't serve this pool, or not with so little memory.
    """
    bare = unwrap_model(model)
    router = PHATGOOSE() if router is None else router
    if not any_base and pool.base is not None:
        check_same_base(pool.base, _fingerprint(model), "the pool's experts")
    router.check(pool.names)
    ops = backend(backend_name, bare.device.type)
    budget = None if device_memory is None else parse_bytes(device_memory)
    routing = Routing(bare, pool, router, ops, dtype, budget)  # raises before anything is attached
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
        if isinstance(site.module, ExpertLinear):  # others all see the text, or never run
            site.router.check_observed()


def _fingerprint(model: Base | PreTrainedModel) -> Fingerprint:
    if isinstance(model, Base):
        return model.fingerprint
    bare = unwrap_model(model)
    known = bare.__dict__.get("_phatgoose_base")
    return (
        known.fingerprint
        if known is not None
        else fingerprint(bare, bare.name_or_path or type(bare).__name__)
    )


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
        modules = modules_by_path(model, pool.modules)
        pool, self.renamed = placed_pool(model, modules, pool)
        check_copies(modules, pool.experts)
        check_parameters(modules, pool.experts)
        if (named := unify_names(model, pool, modules)) is not pool:
            pool, modules = named, modules_by_path(model, named.modules)
        self.model, self.pool, self.router, self.ops, self.dtype = model, pool, router, ops, dtype
        self.device_memory, self.memory = device_memory, available_bytes()
        self.ready = router.prepared(setup_of(model, pool))
        self.streams = Streams(model, reads_text=router.reads == "texts")
        self.recorder: Recorder | None = None
        self._hooks = Hooks()
        self._unrun: Unrun | None = None
        self.sites = [Site(self, path, module_at(modules, path, pool), pool) for path in pool.modules]
        self.budget = None if device_memory is None else Budget(self.sites, device_memory)
        pool.let_go_of_gates()

    @property
    def copied(self) -> dict[str, str]:
        """Modules whose rows were copied together for routing, and why; a packed pool's are used where they stand if they can be."""
        return {site.path: site.copied for site in self.sites if site.copied}

    def attach(self) -> None:
        """Does nothing if it is attached: hooks that stand twice would add every update twice."""
        if self._hooks:
            return
        self.record(None)
        try:
            self._hooks.add(self.streams.attach())
            for site in self.sites:
                self._hooks.add(self._attached(site))
            self._watch()
        except BaseException:
            self.detach()
            raise
        self.model.__dict__[ATTRIBUTE] = self

    def _attached(self, site: Site) -> list[RemovableHandle]:
        hook = site.hook if site.one_operator else site.apart
        handles = [site.module.register_forward_hook(hook, with_kwargs=True)]
        if site.source is not None and site.stack.residual is not None:
            handles += track_residual(site.source, site.module, site.stack.residual)
        return handles

    def _watch(self) -> None:
        """Has it said after the first pass which modules didn't run. Once: what was attached before has been watched."""
        if self._unrun is None:
            modules = [(site.path, site.module) for site in self.sites]
            self._unrun = Unrun(self.model, modules, self.streams)
            self._unrun.attach()

    def detach(self) -> None:
        self._hooks.remove()
        if self._unrun is not None:
            self._unrun.hooks.remove()

    def record(self, recorder: Recorder | None) -> None:
        """Hands every choice to this recorder from now on; None: to nobody."""
        self.recorder = recorder
        self.streams.asked = recorder is not None or not all(site.one_operator for site in self.sites)
        forget_compiled()
