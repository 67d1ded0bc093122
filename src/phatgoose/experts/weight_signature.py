"""The signature of an expert's weights: its ΔW's singular values and input directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from phatgoose.errors import ExpertError
from phatgoose.ops.update import LOW_RANK_FIELDS, Update

_TOGETHER = 128
"""Updates that are decomposed at a time: those of one shape in one call."""


@dataclass(frozen=True, eq=False)
class Signature:
    """ΔW = U diag(values) vectors, without U: the input directions that an update reads, and how strongly.

    q is the rank of ΔW, 0 where ΔW is zero.
    """

    values: Tensor
    """float64 [q]: the singular values above rounding, largest first."""
    vectors: Tensor
    """float64 [q, d_in]: the right-singular vectors as rows, each of length 1 and of either sign."""

    @property
    def arrow(self) -> Tensor:
        """The direction that ΔW stretches most (Arrow, arXiv 2405.11157): float64 [d_in]; zeros where ΔW is zero."""
        return self.vectors[0] if len(self.values) else self.vectors.new_zeros(self.vectors.shape[1])


def why_no_signature(update: Update) -> str | None:
    """Why an update has no signature, or None if it has one: its ΔW must be a low-rank matrix and nothing else."""
    if update.embedding:
        return "an embedding's input is a token's number, which has no direction"
    if update.shared is not None:
        return "it is VeRA, whose matrices are known only where it is routed in its base"
    if update.rank == 0 or not update.fields_set() <= LOW_RANK_FIELDS | {"bias"}:
        return f"it is {update.kind}, and only LoRA's update is a low-rank matrix"
    return None


def signature(update: Update) -> Signature:
    """The singular value decomposition of ΔW = scale · B A, from its factors, in float64.

    With Aᵀ = Q_A R_A and B = Q_B R_B it is that of R_B R_Aᵀ, a matrix of at most r × r, rotated by Q_A. That is
    exact, and no matrix of ΔW's size is made. A bias of the update is ignored, since it doesn't depend on the input.

    Raises:
        ExpertError: the update is no low-rank matrix ((IA)³, DoRA, bottleneck, embedding).
    """
    return next(signatures([update]))


def signatures(updates: Iterable[Update]) -> Iterator[Signature]:
    """The `signature` of each update, in order, of thousands as quickly as LAPACK has them. Raises as `signature`."""
    rest = iter(updates)
    while some := list(islice(rest, _TOGETHER)):
        yield from _decomposed(some)


def _decomposed(updates: list[Update]) -> Iterator[Signature]:
    alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for place, update in enumerate(updates):
        if (reason := why_no_signature(update)) is not None:
            raise ExpertError(f"there is no signature in the weights of this update: {reason}.")
        alike.setdefault((update.A.shape, update.B.shape), []).append(place)
    found: dict[int, Signature] = {}
    for places in alike.values():
        some = [updates[place] for place in places]
        a, b = (torch.stack([t.detach().to("cpu", torch.float64) for t in ts]) for ts in _factors(some))
        q_a, r_a = torch.linalg.qr(a.mT)
        r_b = torch.linalg.qr(b, mode="r").R
        _, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        values = values * torch.tensor([abs(update.scale) for update in some], dtype=values.dtype)[:, None]
        # Singular values below rounding have arbitrary vectors: B or A may lack full rank, or be padded with zeros.
        tiny = max(*a.shape[1:], *b.shape[1:]) * torch.finfo(torch.float64).eps
        known = values > tiny * values[:, :1]
        for place, mine, s, v in zip(places, known, values, right @ q_a.mT, strict=True):
            found[place] = Signature(s[mine], v[mine])
    yield from (found[place] for place in range(len(updates)))


def _factors(updates: list[Update]) -> tuple[list[Tensor], list[Tensor]]:
    return [update.A for update in updates], [update.B for update in updates]
