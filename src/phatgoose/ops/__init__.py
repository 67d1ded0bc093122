"""Routing at one module, on tensors only: score → choose → mix, in several backends.

In: a module's input u and output y, gates, and a `Stack` of its experts' updates. Out: y + Σ w Δ(u).
To add a backend: a module with `gate_scores`, `choose` and `mix` (and `fuse`, if it has one), and its entry in
`backends.py`; the tests then hold it to `reference.py`.

To add a part of an update: its field in `update.py`. If it is one vector per expert, and what it adds is linear in
it, `Update.vectors` names it and `VECTOR_TERMS` of `stack.py` has its term, which all backends then add. Anything
else needs a field of `Stack`, which `fast.py` and `reference.py` add as they add bottleneck adapters. Put the
field's name into `STACKED_FIELDS`: updates with any other field are refused.
"""

from __future__ import annotations

from phatgoose.ops.backends import BACKENDS, Backend, auto_is, backend
from phatgoose.ops.cpu.backend import CpuRouting
from phatgoose.ops.fused import FusedRouting
from phatgoose.ops.stack import Layer, Stack, make_stack

__all__ = [
    "BACKENDS",
    "Backend",
    "CpuRouting",
    "FusedRouting",
    "Layer",
    "Stack",
    "auto_is",
    "backend",
    "make_stack",
]
