"""A pool and a router at one module: gates, low-rank rows, weights that show which module it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import ABSOLUTE, RELATIVE
from phatgoose.models.attach.candidates import candidates_at
from phatgoose.models.base.fingerprint import sample_positions
from phatgoose.ops import Stack
from phatgoose.routers import Router
from phatgoose.routers.parse import parse_router
from phatgoose.routers.router import Candidates, Encoder, Setup

SAMPLES = 32


def prepare_router(text: str, pool: Pool) -> Router:
    """The router that `text` names, prepared for this pool.

    Raises:
        RoutingError, UnknownName, PluginError: there is no such router, or it can't serve this pool, or it reads text.
    """
    router = parse_router(text)
    router.check(pool.names)
    if router.reads == "texts":
        raise _no_gates(router)

    def encoder(name: str) -> Encoder:
        raise _no_gates(router)

    return router.prepared(Setup(pool.experts, None, encoder))


def bind(pool: Pool, router: Router, path: str) -> tuple[Candidates, Tensor, int]:
    """The router at the module `path`: its experts, with the null candidate where the router offers it; their
    standardised gates, float32 [candidates, d_in]; and top_k.

    Raises:
        RoutingError: an expert here isn't LoRA alone, or lacks what the router needs, or the router doesn't
            choose by gates.
    """
    candidates = candidates_at(pool, path, router.offers_null)
    for member, update in zip(candidates.members, candidates.updates, strict=True):
        if update is not None and not update.is_low_rank:
            raise RoutingError(
                f"expert {pool.names[member]!r} is {update.described} at {path}; in vLLM only plain LoRA of "
                "linear layers is routed. Serve a pool without it (`phatgoose pool remove`), or route it in "
                "transformers."
            )
    bound = router.bind(candidates)
    if bound.by_gates is None:
        raise _no_gates(router)
    return candidates, *bound.by_gates


def shard_stack(stack: Stack, columns: range, rows: Sequence[range], d_in: int, d_out: int) -> Stack:
    """The part of a stack with these inputs and outputs, as one rank holds it. A and B aren't copied if it is
    all of them."""
    a = stack.A if len(columns) == d_in else stack.A[:, columns.start : columns.stop].clone()
    whole = len(rows) == 1 and len(rows[0]) == d_out
    b = stack.B if whole else torch.cat([stack.B[:, r.start : r.stop] for r in rows], 1)
    return replace(stack, A=a, B=b)


def _no_gates(router: Router) -> RoutingError:
    name = type(getattr(router, "settings", router)).__name__
    return RoutingError(
        f"{name} can't be served by vLLM, where a router must choose by gates, one vector per expert and "
        "module: phatgoose, average-activation or shuffled-gates. PHATGOOSE needs every expert to have gates "
        "(`phatgoose gate`)."
    )


def sample(module: nn.Module, path: str) -> tuple[float, ...]:
    """SAMPLES values of the weight [d_out, d_in] of a linear module, at places that depend only on its path
    and shape."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    flat = torch.tensor(sample_positions(path, weight.shape, SAMPLES))
    return tuple(weight[torch.unravel_index(flat, weight.shape)].float().tolist())


def differing(
    part: Tensor, path: str, expected: tuple[float, ...], rows: range, columns: range, size: tuple[int, int]
) -> str:
    """How `part`, some rows and columns of a module's weight, differs from the samples; "" if by no more than a cast.

    Args:
        size: d_out and d_in of the whole module.
    """
    for flat, value in zip(sample_positions(path, size, SAMPLES), expected, strict=True):
        row, column = divmod(flat, size[1])
        if row not in rows or column not in columns:
            continue
        found = float(part[row - rows.start, column - columns.start])
        if not abs(found - value) <= RELATIVE * max(abs(found), abs(value)) + ABSOLUTE:
            return f"the weight at row {row}, column {column} is {found:.6g}, expected {value:.6g}"
    return ""
