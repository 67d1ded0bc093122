"""A pool and a router at one module, as gates and low-rank rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.candidates import candidates_at, stacked
from phatgoose.ops import Stack
from phatgoose.routers import Router
from phatgoose.routers.parse import parse_router
from phatgoose.routers.router import Candidates, Encoder, Setup


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


@dataclass(frozen=True, eq=False)
class Bound:
    """The experts at one module, with the null candidate where the router offers it."""

    candidates: Candidates
    gates: Tensor
    """Standardised, float32 [candidates, d_in]."""
    top_k: int
    pool: Pool

    @property
    def sizes(self) -> tuple[int, int]:
        """d_in and d_out."""
        update = next(u for u in self.candidates.updates if u is not None)
        return update.d_in, update.d_out

    def stack(self, d_in: int, d_out: int, dtype: torch.dtype) -> Stack:
        """The whole module's stack; of a packed pool in this dtype, views of its file.

        Raises:
            RoutingError: values that aren't finite in this dtype.
        """
        return stacked(self.pool, self.candidates, (d_in, d_out), dtype)[0]


def bind(pool: Pool, router: Router, path: str) -> Bound:
    """The router at the module `path`.

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
    return Bound(candidates, *bound.by_gates, pool)


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
