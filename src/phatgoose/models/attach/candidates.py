"""The experts of a pool at one module: as a router's candidates, and stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.ops import Stack, make_stack
from phatgoose.ops.bottleneck import Residual
from phatgoose.ops.update import Update
from phatgoose.routers.router import Candidates


def candidates_at(pool: Pool, path: str, offers_null: bool) -> Candidates:
    """The experts that adapt a module, and the null candidate if it is offered and some expert is absent."""
    members = [i for i, expert in enumerate(pool.experts) if path in expert.sizes]
    updates: list[Update | None] = [pool.experts[i].updates[path] for i in members]
    gates = [(pool.experts[i].gates or {}).get(path) for i in members]
    d_in, d_out, embedding = pool.experts[members[0]].sizes[path]
    if offers_null and len(members) < len(pool.experts):
        members, updates, gates = [*members, -1], [*updates, None], [*gates, None]
    # An embedding's input is a token's number, which has no direction: its gates read its output.
    length = d_out if embedding else d_in
    return Candidates(path, pool.names, tuple(members), tuple(gates), length, tuple(updates))


def stacked(
    pool: Pool,
    candidates: Candidates,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    residual: Residual | None = None,
) -> tuple[Stack, int, str]:
    """Stacks the candidates' updates.

    Returns the stack; the size of the packed pool's file if the stack consists of views of it, else 0; and why a
    packed pool's rows were copied, if they were.

    Raises:
        RoutingError: an expert has values that aren't finite in this dtype.
    """
    path, nulls = candidates.path, candidates.members.count(-1)
    rows, copied = pool.rows(path, dtype)
    in_place = None if rows is None else (rows.A, rows.B, (*rows.starts, *(0,) * nulls))
    stack = make_stack(candidates.updates, *sizes, dtype, in_place, residual)
    names = [candidates.names[i] for i in candidates.members if i >= 0]
    _check_finite(stack, names, path, mapped=rows is not None)
    return stack, 0 if rows is None else rows.file_bytes, copied


def _check_finite(stack: Stack, names: Sequence[str], path: str, mapped: bool) -> None:
    """Raises RoutingError, naming the expert, if a value of a stack isn't finite.

    mapped: A and B are views of a packed pool's file. They are read when they are used, and not before by this check.
    """
    bad: set[int] = set()
    if not mapped and not (_finite(stack.A) and _finite(stack.B)):
        parts = [(e, stack.rows(e)) for e in range(stack.experts)]
        bad |= {e for e, rows in parts if not (_finite(stack.A[rows]) and _finite(stack.B[rows]))}
    for vectors in stack.vectors.values():
        bad |= set(vectors.experts[~vectors.values.isfinite().all(1)].tolist())
    for expert, bottleneck in stack.bottlenecks:
        if not all(map(_finite, bottleneck.tensors().values())):
            bad.add(expert)
    if bad:
        raise RoutingError(
            f"{path}: {', '.join(names[e] for e in sorted(bad))}: values that aren't finite in {stack.A.dtype}. They "
            "are too large for it (load the base in float32 or bfloat16, or route(…, dtype=torch.float32)), or a "
            "DoRA divides by a row of zeros."
        )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
