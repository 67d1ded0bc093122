"""What spoke for whom: the evidence that Gander gathered in a prompt, by token and by module."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import Base
from phatgoose.models.trace.scores import scores_of
from phatgoose.routers.gander import Gander

STRONGEST = 5
"""Experts that are shown at least, if there are as many."""


@dataclass(frozen=True)
class Evidence:
    """L of some experts at the end of a prompt, the highest first, and its parts.

    Newer tokens count more, as they do in L: each part is what is left of it at the prompt's end. What the modules add,
    and what the tokens add, sums to `sums`.
    """

    experts: tuple[str, ...]
    sums: tuple[float, ...]
    modules: tuple[str, ...]
    """Those that were read."""
    tokens: tuple[str, ...]
    by_module: tuple[tuple[float, ...], ...]
    """[expert][module]"""
    by_token: tuple[tuple[float, ...], ...]
    """[expert][token]; 0 for what stands before the text."""


def gathered(base: Base, router: Gander, ids: Tensor, wanted: Collection[str] = ()) -> Evidence:
    """The evidence in the prompt `ids` [1, T], for the strongest experts and those in `wanted`.

    `router` must be attached, alone or masked.
    """
    routing = routing_of(base)
    assert routing is not None
    found, names = scores_of(base, ids), routing.pool.names
    # What is read acts on nothing. A module that isn't read, nor acts, has no scores.
    read = [site.path for site in routing.sites if not site.router.acts and site.path in found]
    parts = torch.stack([found[path].nan_to_num(0.0) for path in read]).double()  # [modules, T, experts]
    if not base.is_encoder_decoder:
        age = torch.arange(parts.shape[1] - 1, -1, -1, dtype=torch.float64)
        parts = parts * (2 ** (-age / router.half_life))[None, :, None]
    sums = parts.sum((0, 1))
    order = sums.argsort(descending=True).tolist()
    shown = [e for place, e in enumerate(order) if place < STRONGEST or names[e] in wanted]
    return Evidence(
        tuple(names[e] for e in shown),
        tuple(sums[shown].tolist()),
        tuple(read),
        tuple(str(base.tokenizer.decode([token])) for token in ids[0].tolist()),
        tuple(map(tuple, parts[:, :, shown].sum(1).T.tolist())),
        tuple(map(tuple, parts[:, :, shown].sum(0).T.tolist())),
    )
