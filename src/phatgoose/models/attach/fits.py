"""Whether a module's stack of updates is finite in the dtype it is computed in: an expert's own values may not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import Stack


def check_finite_stack(stack: Stack, names: Sequence[str], path: str, mapped: bool) -> None:
    """Raises RoutingError, naming the expert, if a value of a stack isn't finite.

    Args:
        names: the experts' names, in the stack's order; the null candidate may be left out.
        mapped: whether A and B are views of a packed pool's file, whose values nobody reads before they are used.
    """
    bad: set[int] = set()
    if not mapped and not (_finite(stack.A) and _finite(stack.B)):
        rows = range(stack.experts)
        bad |= {e for e in rows if not (_finite(stack.A[stack.rows(e)]) and _finite(stack.B[stack.rows(e)]))}
    for vectors in stack.vectors.values():
        bad |= set(vectors.experts[~vectors.values.isfinite().all(1)].tolist())
    for expert, bottleneck in stack.bottlenecks:
        if not all(map(_finite, bottleneck.tensors().values())):
            bad.add(expert)
    if bad:
        raise RoutingError(
            f"{path}: {', '.join(names[e] for e in sorted(bad))}: values that aren't finite in {stack.A.dtype}. They are too large "
            "for it (load the base in float32 or bfloat16, or route(…, dtype=torch.float32)), or a DoRA divides by a row of zeros."
        )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
