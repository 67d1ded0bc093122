"""`PoolVersion`: a pool prepared for one model. `Route`: a router over its experts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import Routing, check_base
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.attach.reference_text import calibrate
from phatgoose.models.base.base import Base
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.ops import FusedRouting
from phatgoose.registry import unknown
from phatgoose.routers import Router, Single
from phatgoose.routers.constant import Fixed
from phatgoose.routers.masked import Masked, Switches
from phatgoose.routers.router import BoundRouter, Candidates, Encoder

CACHED_TEXTS = 1024
"""How many texts' embeddings are kept."""


@dataclass(frozen=True)
class _NullOffered(Router):
    """Chooses nothing, but has the stacks keep room for the null candidate: routers with and without it share them."""

    offers_null = True

    def bind(self, candidates: Candidates) -> BoundRouter:
        return Fixed((), 1.0)


class PoolVersion:
    """A pool's experts, stacked at every module of one model: made once, shared by all routers.

    Nothing is attached to the model; `MultiRouter.attach` does that.

    Raises:
        BaseModelError: the model is not the base that the pool records. RoutingError: a module is missing or of
            another shape.
    """

    def __init__(self, base: Base, pool: Pool, options: RouteOptions | None = None):
        options = RouteOptions() if options is None else options
        check_base(base, pool, options)
        self.base, self.pool = base, pool
        # Of a base with offloaded weights, the model's own device is "meta", for which there is no kernel.
        self.routing = Routing(base.model, pool, _NullOffered(), options, base.device)
        self.ops = self.routing.ops
        self.sites = {site.path: site for site in self.routing.sites}
        for site in self.sites.values():  # to its module's device, before anything is prepared from it
            weight = getattr(site.module, "weight", None)
            device = weight.device if isinstance(weight, Tensor) and not weight.is_meta else base.device
            if site.stack.A.device != device:
                site.stack = site.stack.to(device)
        self.by_expert = {path: site.candidates.by_expert() for path, site in self.sites.items()}


class Route:
    """One router over the experts of a version that aren't switched off.

    Args:
        router: the router. If it needs the reference text, call `calibrate` before the route is used.
        off: names of experts that are switched off, as if the pool didn't have them.
        encoder: the sentence encoder to load for the name that the router or the experts' signatures give; may raise a
            RoutingError. A server must not load whatever an expert's author names.

    Raises:
        RoutingError: the router can't serve this pool, can't switch experts off, or every expert is off.
        UnknownName: an expert that the pool lacks.
    """

    def __init__(
        self,
        version: PoolVersion,
        router: Router,
        off: Collection[str] = (),
        encoder: Callable[[str], str] = str,
    ):
        self.version, self.router, self.off = version, router, frozenset(off)
        names = version.pool.names
        for name in sorted(self.off):
            if name not in names:
                raise unknown("expert", name, names)
        if len(self.off) == len(names):
            raise RoutingError("every expert is switched off: switch one on, or ask for the base.")
        router.check(names)
        self.reads_text, self.remembers = router.reads == "texts", router.remembers
        self.by_sequence = self.reads_text or self.remembers
        """Whether its router is shown whole sequences, each in a row."""
        inside = next(
            (path for path, site in version.sites.items() if isinstance(site.module, ExpertLinear)), None
        )
        if self.by_sequence and inside is not None:
            raise RoutingError(
                f"{inside} is inside a mixture's experts, where {type(router).__name__} can't tell requests apart "
                "yet: take a router that goes by gates or weights, or route() a separate copy of the model."
            )
        self.single: int | None = None
        """The one expert that acts, with weight 1; None if a router chooses."""
        self.bound: dict[str, BoundRouter] = {}
        self.fused: dict[str, FusedRouting] = {}
        if isinstance(router, Single):
            self.single = router.place(names)
            if names[self.single] in self.off:
                raise RoutingError(f"expert {names[self.single]!r} is switched off.")
            return
        if self.off:
            on = torch.tensor([[name not in self.off for name in names]])
            router = Masked(router, Switches(on))
        setup = version.routing.setup()
        router = router.prepared(
            replace(setup, encoder=lambda name: _CachingEncoder(setup.encoder(encoder(name))))
        )
        for path, site in version.sites.items():
            self.bound[path] = bound = router.bind(_visible(site.candidates, router.offers_null))
            if (fused := site.fuse(bound.by_gates)) is not None:
                self.fused[path] = fused

    @property
    def needs_reference(self) -> bool:
        return any(bound.needs_reference for bound in self.bound.values())

    def calibrate(self) -> None:
        """Shows the reference text to routers that need it, on the base alone: nothing may be attached to the model
        that changes what it computes, and no other pass may run. Raises RoutingError if the base computes values that
        aren't finite on it."""
        version = self.version
        routers = [
            (version.sites[path], bound) for path, bound in self.bound.items() if bound.needs_reference
        ]
        calibrate(version.base, routers, version.ops)


class _CachingEncoder:
    """An encoder that caches the embeddings of the last texts, as every pass asks for its sequences' prompts."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.name, self.sha256 = encoder, encoder.name, encoder.sha256
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self.encoder(new), strict=True))
        found = [self._known[text] for text in texts]
        for text in texts:
            self._known.move_to_end(text)
        while len(self._known) > CACHED_TEXTS:
            self._known.popitem(last=False)
        return torch.stack(found) if found else self.encoder([])


def _visible(candidates: Candidates, null: bool) -> Candidates:
    """The candidates without the null candidate, which is the last, for a router that offers none."""
    if null or -1 not in candidates.members:
        return candidates
    return replace(
        candidates,
        members=candidates.members[:-1],
        gates=candidates.gates[:-1],
        updates=candidates.updates[:-1],
    )
