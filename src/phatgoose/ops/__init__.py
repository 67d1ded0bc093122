"""Routing at one module, on tensors only: score → choose → mix, in several backends behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Protocol

from torch import Tensor

from phatgoose.ops import fast, reference
from phatgoose.ops.cpu import backend as cpu_backend
from phatgoose.ops.cpu import build
from phatgoose.ops.cpu.backend import Fused
from phatgoose.ops.stack import Layer, Stack, make_stack
from phatgoose.ops.triton import backend as triton_backend
from phatgoose.registry import unknown


class Prepared(Protocol):
    """The three steps of one module in one call, made once and called often."""

    def __call__(self, u: Tensor, y: Tensor, into_y: bool = False) -> Tensor | None:
        """y + Σ w Δ(u); u: [..., d_in], y: [..., d_out]. With `into_y`, y may be written into and returned.

        None where only score, choose and mix can do it, and the backend may let them.
        """

    def can(self, u: Tensor, y: Tensor) -> bool:
        """Whether `with_choice` can do this call."""

    def with_choice(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Also who was chosen, int64 [N, k], and their weights, float32 [N, k]."""


@dataclass(frozen=True)
class Backend:
    """The three steps, as `phatgoose.ops.reference` documents them."""

    name: str
    gate_scores: Callable[[Tensor, Tensor], Tensor]
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    mix: Callable[[Tensor, Tensor, Stack, Tensor, Tensor, Layer | None], Tensor]
    fuse: Callable[[Tensor, int, Stack, Layer | None], Prepared | None] | None = None
    """(gates, top_k, stack, layer) → the three steps in one call, where the backend has that for such a stack."""

    def routed_update(
        self, u: Tensor, y: Tensor, gates: Tensor, stack: Stack, top_k: int, layer: Layer | None = None
    ) -> Tensor:
        """y + Σ w_e Δ_e(u), the `top_k` experts chosen by their gates. u: [N, d_in], y: [N, d_out], gates: standardised [E, d_in].

        Where a module is called often, prepare it once with `fuse`.
        """
        fused = None if self.fuse is None else self.fuse(gates, top_k, stack, layer)
        if fused is not None and (done := fused(u, y)) is not None:
            return done
        chosen, weights = self.choose(self.gate_scores(u, gates), top_k)
        return self.mix(u, y, stack, chosen, weights, layer)


def _auto_mix(
    kernels: str,
    u: Tensor,
    y: Tensor,
    stack: Stack,
    chosen: Tensor,
    weights: Tensor,
    layer: Layer | None = None,
) -> Tensor:
    """By these kernels where they can, else by torch."""
    own: ModuleType = {"cpu": cpu_backend, "triton": triton_backend}[kernels]
    way = fast if own.obstacle(u, y, stack) else own
    return way.mix(u, y, stack, chosen, weights, layer)


def _fuse(gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None) -> Prepared | None:
    return None if stack.embedding else Fused(gates, top_k, stack, layer)


def _auto_fuse(gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None) -> Prepared | None:
    fits = stack.A.is_cpu and stack.A.dtype in cpu_backend.DTYPES and not stack.embedding
    return Fused(gates, top_k, stack, layer, strict=False) if fits else None


def _triton_fuse(
    gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None, strict: bool = True
) -> Prepared | None:
    if stack.embedding or min(top_k, stack.experts) > triton_backend.MOST_FUSED:
        return None
    return triton_backend.Fused(gates, top_k, stack, layer, strict)


BACKENDS = {
    "reference": Backend("reference", reference.gate_scores, reference.choose, reference.mix),
    "torch": Backend("torch", fast.gate_scores, fast.choose, fast.mix),
    "cpu": Backend("cpu", cpu_backend.gate_scores, cpu_backend.choose, cpu_backend.mix, _fuse),
    "triton": Backend(
        "triton", triton_backend.gate_scores, triton_backend.choose, triton_backend.mix, _triton_fuse
    ),
}
_AUTO = Backend("auto", fast.gate_scores, fast.choose, partial(_auto_mix, "cpu"), _auto_fuse)
_AUTO_GPU = Backend(
    "auto",
    fast.gate_scores,
    fast.choose,
    partial(_auto_mix, "triton"),
    partial(_triton_fuse, strict=False),
)


def backend(name: str = "auto", device: str = "cpu") -> Backend:
    """The backend of this name, for models on this type of device.

    "auto" is "cpu" on CPUs and "triton" on GPUs for whatever these can do, if they can be used here, and "torch" for the rest (other
    devices and dtypes, gradients); `auto_is` says which. Any other name is that backend and no other.

    Raises:
        UnknownName: with the known names. RoutingError: "cpu" or "triton" was asked for, and there is no kernel here; says why.
    """
    if name == "auto":
        kind = auto_is(device)[0]
        return {"cpu": _AUTO, "triton": _AUTO_GPU}.get(kind, BACKENDS["torch"])
    if name not in BACKENDS:
        raise unknown("backend", name, [*BACKENDS, "auto"])
    if name == "cpu":
        build.library()
    if name == "triton":
        triton_backend.require()
    return BACKENDS[name]


def auto_is(device: str = "cpu") -> tuple[str, str]:
    """What "auto" is here on this type of device, "cpu", "triton" or "torch", and why."""
    if device == "cuda":
        if (why := triton_backend.reason()) is not None:
            return "torch", why
        return "triton", triton_backend.version()
    if device != "cpu":
        return "torch", f"there is no kernel for devices of type {device}"
    if (why := build.reason()) is not None:
        return "torch", why
    found = build.library()
    return "cpu", f"compiled kernel, {found.variants[0]} instructions ({found.path})"


__all__ = [
    "BACKENDS",
    "Backend",
    "Fused",
    "Layer",
    "Prepared",
    "Stack",
    "auto_is",
    "backend",
    "make_stack",
]
