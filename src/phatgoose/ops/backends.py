"""The backends by name, and which of them "auto" is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

import phatgoose.ops.operators  # noqa: F401  (registers torch.ops.phatgoose)
from phatgoose.ops import fast, reference
from phatgoose.ops.cpu import backend as cpu
from phatgoose.ops.cpu import build
from phatgoose.ops.fused import Choice, FusedRouting
from phatgoose.ops.stack import Layer, Stack
from phatgoose.ops.triton import backend as triton
from phatgoose.registry import unknown

Mix = Callable[[Tensor, Tensor, Stack, Tensor, Tensor, Layer | None], Tensor]
GivenMix = Callable[[Tensor, Tensor, Choice, bool], Tensor | None]
Given = Callable[[Stack, Layer | None], GivenMix | None]
Fuse = Callable[[Tensor, int, Stack, Layer | None], FusedRouting | None]


@dataclass(frozen=True)
class Backend:
    """The three steps, as `phatgoose.ops.reference` documents them."""

    name: str
    gate_scores: Callable[[Tensor, Tensor], Tensor]
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    mix: Mix
    fuse: Fuse | None = None
    """(gates, top_k, stack, layer) → the three steps in one call; None if the backend can't do that for this stack."""
    given: Given | None = None
    """(stack, layer) → (u, y, choice, into_y) → as `mix`, for u and y of any leading shape; None where `mix` must do
    it. None for a stack that it can't take."""

    def routed_update(
        self, u: Tensor, y: Tensor, gates: Tensor, stack: Stack, top_k: int, layer: Layer | None = None
    ) -> Tensor:
        """Deprecated: call what `fuse` makes, or `gate_scores`, `choose` and `mix`."""
        instead = "call what fuse makes, or gate_scores, choose and mix"
        warnings.warn(f"Backend.routed_update is deprecated: {instead}.", DeprecationWarning, stacklevel=2)
        fused = None if self.fuse is None else self.fuse(gates, top_k, stack, layer)
        if fused is not None and (done := fused(u, y)) is not None:
            return done
        chosen, weights = self.choose(self.gate_scores(u, gates), top_k)
        return self.mix(u, y, stack, chosen, weights, layer)


BACKENDS = {
    "reference": Backend("reference", reference.gate_scores, reference.choose, reference.mix),
    "torch": Backend("torch", fast.gate_scores, fast.choose, fast.mix),
    "cpu": Backend("cpu", cpu.gate_scores, cpu.choose, cpu.mix, cpu.fuse, cpu.given),
    "triton": Backend("triton", triton.gate_scores, triton.choose, triton.mix, triton.fuse),
}
_AUTO = {
    kernels: Backend(
        "auto",
        fast.gate_scores,
        fast.choose,
        replace(module.mix, strict=False),
        partial(module.fuse, strict=False),
        getattr(module, "given", None),
    )
    for kernels, module in (("cpu", cpu), ("triton", triton))
}


def backend(name: str = "auto", device: str = "cpu") -> Backend:
    """The backend of this name, for models on this type of device.

    "auto" is "cpu" on CPUs and "triton" on GPUs, if these can be used here, for whatever they can do. It is
    "torch" for the rest (other devices and dtypes, gradients); `auto_is` says which. Any other name is that
    backend and no other.

    Raises:
        UnknownName: with the known names. RoutingError: "cpu" or "triton" was asked for and can't be used
            here; says why.
    """
    if name == "auto":
        kind, _ = auto_is(device)
        return _AUTO.get(kind, BACKENDS["torch"])
    if name not in BACKENDS:
        raise unknown("backend", name, [*BACKENDS, "auto"])
    if name == "cpu":
        build.library()
    if name == "triton":
        triton.require()
    return BACKENDS[name]


def auto_is(device: str = "cpu") -> tuple[str, str]:
    """What "auto" is on this type of device, "cpu", "triton" or "torch", and why."""
    if device == "cuda":
        if (why := triton.reason()) is not None:
            return "torch", why
        return "triton", triton.version()
    if device != "cpu":
        return "torch", f"there is no kernel for devices of type {device}"
    if (why := build.reason()) is not None:
        return "torch", why
    found = build.library()
    return "cpu", f"compiled kernel, {found.variants[0]} instructions ({found.path})"
