"""Routing at one module, on tensors only: score → choose → mix, in several backends behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from phatgoose.ops import fast, reference
from phatgoose.ops.stack import Layer, Part, Stack, make_stack
from phatgoose.registry import unknown


@dataclass(frozen=True)
class Backend:
    """The three steps, as `phatgoose.ops.reference` documents them."""

    name: str
    gate_scores: Callable[[Tensor, Tensor], Tensor]
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    mix: Callable[[Tensor, Tensor, Stack, Tensor, Tensor, Layer | None], Tensor]


BACKENDS = {
    "reference": Backend("reference", reference.gate_scores, reference.choose, reference.mix),
    "torch": Backend("torch", fast.gate_scores, fast.choose, fast.mix),
}


def backend(name: str = "auto") -> Backend:
    """The backend of this name; "auto" is the fastest one that runs here, at present always "torch".

    Raises:
        UnknownName: with the known names.
    """
    if name == "auto":
        return BACKENDS["torch"]
    if name not in BACKENDS:
        raise unknown("backend", name, [*BACKENDS, "auto"])
    return BACKENDS[name]


__all__ = ["BACKENDS", "Backend", "Layer", "Part", "Stack", "backend", "make_stack"]
