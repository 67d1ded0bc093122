"""Attach routing to a model, and take it off again.

A forward hook on each adapted module adds Σ w_e Δ_e(u) to the module's own output. Modules, parameter names and the
state dict stay as they are, so generate(), save_pretrained(), device_map and quantised bases go on working.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import check_same_base
from phatgoose.models.attach.options import CacheUse, RouteOptions
from phatgoose.models.attach.reference_text import calibrate
from phatgoose.models.attach.site import ATTRIBUTE, Routing
from phatgoose.models.base.base import Base, known_base, unwrap_model
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.context.runs import Announced
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
    _calibrate(known_base(model), routing)
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
    if options.any_base or pool.base is None:
        return
    base, bare = known_base(model), unwrap_model(model)
    found = fingerprint(bare, bare.name_or_path or type(bare).__name__) if base is None else base.fingerprint
    check_same_base(pool.base, found, "the pool's experts")


def _calibrate(base: Base | None, routing: Routing) -> None:
    """Shows the reference text to routers that need it, on the base alone."""
    routers = [(site, site.router) for site in routing.sites if site.router.needs_reference]
    if not routers:
        return
    earlier = routing_of(routing.model)
    if base is None:
        raise RoutingError(
            f"{type(routing.router).__name__} compares scores on reference text, for which it needs the tokenizer: "
            "pass the Base."
        )
    if earlier is not None:
        earlier.detach()
    try:
        calibrate(base, routers, routing.ops)
    finally:
        if earlier is not None:
            earlier.attach()


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


def select_encoded(model: Base | PreTrainedModel, encoded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (int64 [n]) of what this model's encoder returned, for a decoder to read: what is known of them follows."""
    selected = encoded[rows.to(encoded.device)]
    if (routing := routing_of(model)) is not None:
        routing.streams.select_encoded(encoded, selected, rows)
    return selected


def cache_use(model: Base | PreTrainedModel) -> CacheUse | None:
    """How the pool attached to this model uses its `device_memory`; None if it has none."""
    routing = routing_of(model)
    return None if routing is None or routing.budget is None else routing.budget.use()


@contextlib.contextmanager
def prompted(
    model: Base | PreTrainedModel,
    prompts: Sequence[str | Sequence[int]],
    written: Sequence[Sequence[int]] | None = None,
) -> Iterator[None]:
    """Inside, the rows of every call of the model in this thread work on these prompts, one each (beams repeat them).

    Only routers that read text (Retrieval, Centroid, SoftCentroid) need it. For them, the prompt is everything that a
    call without a cache is given to read. Announce prompts if that is more than the prompt (an answer stands behind
    it), or isn't what should be compared (a chat's template).

    Args:
        prompts: texts, or token ids. If ids are given, what follows them in a row counts as written.
        written: for a key-value cache that was filled before routing was attached: what stands in it behind each
            prompt.
    """
    routing = routing_of(model)
    tracker = None if routing is None else routing.streams.prompt_tracker
    if tracker is None or not prompts:
        yield
        return
    read = tuple(p if isinstance(p, str) else tuple(int(i) for i in p) for p in prompts)
    behind = None if written is None else tuple(tuple(int(i) for i in w) for w in written)
    before = tracker.announce(Announced(read, behind))
    try:
        yield
    finally:
        tracker.announce(before)
