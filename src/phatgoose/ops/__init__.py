"""Routing at one module, on tensors only: score → choose → mix, in several backends behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from phatgoose.ops import build, cpu, fast, reference
from phatgoose.ops.cpu import Fused
from phatgoose.ops.stack import Layer, Part, Stack, make_stack
from phatgoose.registry import unknown


@dataclass(frozen=True)
class Backend:
    """The three steps, as `phatgoose.ops.reference` documents them."""

    name: str
    gate_scores: Callable[[Tensor, Tensor], Tensor]
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    mix: Callable[[Tensor, Tensor, Stack, Tensor, Tensor, Layer | None], Tensor]
    fuse: Callable[[Tensor, int, Stack, Layer | None], Fused | None] | None = None
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
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None = None
) -> Tensor:
    way = fast if cpu.obstacle(u, y, stack) else cpu
    return way.mix(u, y, stack, chosen, weights, layer)


def _fuse(gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None) -> Fused | None:
    return None if stack.embedding else Fused(gates, top_k, stack, layer)


def _auto_fuse(gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None) -> Fused | None:
    fits = stack.A.is_cpu and stack.A.dtype in cpu.DTYPES and not stack.embedding
    return Fused(gates, top_k, stack, layer, strict=False) if fits else None


BACKENDS = {
    "reference": Backend("reference", reference.gate_scores, reference.choose, reference.mix),
    "torch": Backend("torch", fast.gate_scores, fast.choose, fast.mix),
    "cpu": Backend("cpu", cpu.gate_scores, cpu.choose, cpu.mix, _fuse),
}
_AUTO = Backend("auto", fast.gate_scores, fast.choose, _auto_mix, _auto_fuse)


def backend(name: str = "auto", device: str = "cpu") -> Backend:
    """The backend of this name, for models on this type of device.

    "auto" is "cpu" for whatever that can do, if its kernel can be compiled here, and "torch" for the rest (other devices and
    dtypes, gradients); `auto_is` says which. Any other name is that backend and no other.

    Raises:
        UnknownName: with the known names. RoutingError: "cpu" was asked for, and there is no kernel here; says why.
    """
    if name == "auto":
        return BACKENDS["torch"] if device != "cpu" or build.reason() else _AUTO
    if name not in BACKENDS:
        raise unknown("backend", name, [*BACKENDS, "auto"])
    if name == "cpu":
        build.library()
    return BACKENDS[name]


def auto_is() -> tuple[str, str]:
    """What "auto" is on CPUs here, "cpu" or "torch", and why."""
    if (why := build.reason()) is not None:
        return "torch", why
    found = build.library()
    return "cpu", f"compiled kernel, {found.variants[0]} instructions ({found.path})"


__all__ = ["BACKENDS", "Backend", "Fused", "Layer", "Part", "Stack", "auto_is", "backend", "make_stack"]
