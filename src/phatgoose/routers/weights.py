"""Routers that score tokens by an expert's weights: no data, no training.

V is the matrix of right-singular vectors of an expert's ΔW, S its singular values, u a token's input of the module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts import weight_signature
from phatgoose.experts.weight_signature import Signature, why_no_signature
from phatgoose.ops import Backend
from phatgoose.ops.reference import standardise
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import BoundRouter, ByScores, Candidates, Router, TopK, check_at_least


@dataclass(frozen=True)
class Arrow(TopK):
    """Top-k by |v₁ᵀu|, v₁ the direction that ΔW stretches most; softmax over the top k (Ostapenko et al. 2024,
    arXiv 2405.11157).

    Needs LoRA weights, nothing else. Every token at every module chooses for itself.
    """

    paper = "Ostapenko et al. 2024, arXiv 2405.11157"
    needs = "LoRA weights"

    def bind(self, candidates: Candidates) -> BoundRouter:
        found = signatures(candidates, type(self).__name__)
        return _ByNorms(ProjectionNorms([s.arrow[None] for s in found]), self.top_k)


@dataclass(frozen=True)
class SpectR(TopK):
    """Top-k by ‖S Vᵀu‖ = ‖ΔW u‖, how much the update does to u; softmax over the top k (Fleshman & Van Durme,
    arXiv 2504.03454).

    Needs LoRA weights, nothing else. Every token at every module chooses for itself. ΔW includes LoRA's scale.
    """

    paper = "Fleshman & Van Durme 2025, arXiv 2504.03454"
    needs = "LoRA weights"

    def bind(self, candidates: Candidates) -> BoundRouter:
        found = signatures(candidates, type(self).__name__)
        return _ByNorms(ProjectionNorms([s.values[:, None] * s.vectors for s in found]), self.top_k)


@dataclass(frozen=True)
class LAG(Router):
    """Arrow's first 20 by |v₁ᵀu|, of these the best by ‖Vᵀu‖, its equations 6 and 7 (Fleshman & Van Durme,
    arXiv 2507.05346).

    Needs LoRA weights, nothing else. Every token at every module chooses for itself. The paper's two stages
    save time on a thousand experts; here both scores of all experts are computed.
    """

    first: int = 20
    """How many experts Arrow leaves to choose among."""
    top_k: int = 1
    """How many experts act on each token; the paper's method applies one."""

    paper = "Fleshman & Van Durme 2025, arXiv 2507.05346"
    needs = "LoRA weights"
    chooses = "top_k experts per token and module"

    def __post_init__(self) -> None:
        check_at_least(self, first=1, top_k=1)

    def bind(self, candidates: Candidates) -> BoundRouter:
        found = list(signatures(candidates, type(self).__name__))
        arrow_norms = ProjectionNorms([s.arrow[None] for s in found])
        return _Lag(arrow_norms, ProjectionNorms([s.vectors for s in found]), self)


@dataclass(frozen=True)
class WeightOnly(TopK):
    """Top-k by ‖Vᵀū‖, standardised on reference text (docs/method.md, "Experts without gates"); softmax over the top k.

    What PHATGOOSE(ungated="weights") does for experts without gates, for all experts: gates are not used.
    Needs LoRA weights and, when it is attached, one pass of the base over a built-in text. Every token at
    every module chooses for itself.
    """

    paper = "ours"
    needs = "LoRA weights, one pass of the base"
    offers_null = True

    def bind(self, candidates: Candidates) -> BoundRouter:
        return Calibrated(candidates, (None,) * len(candidates.members), self.top_k, type(self).__name__)


def signatures(
    candidates: Candidates, needed_by: str, which: Sequence[int] | None = None
) -> Iterator[Signature]:
    """The weight signatures of the candidates at these indices (None: of all). The null candidate's is empty.

    Raises:
        RoutingError: an expert's update has no signature; the message names the expert.
    """
    updates = []
    for index in range(len(candidates.members)) if which is None else which:
        update, member = candidates.updates[index], candidates.members[index]
        if update is not None and (reason := why_no_signature(update)) is not None:
            raise RoutingError(
                f"expert {candidates.names[member]!r} has no signature in its weights at {candidates.path}, "
                f"which {needed_by} needs: {reason}. Give it gates with `phatgoose gate` (--generated needs "
                "no data), or choose another router."
            )
        updates.append(update)
    found = weight_signature.signatures(update for update in updates if update is not None)
    nothing = torch.zeros(0, candidates.d_in, dtype=torch.float64)
    return (Signature(nothing[:, 0], nothing) if update is None else next(found) for update in updates)


SHRINKAGE = 0.3
"""How much of its mean variance a covariance gets in every direction, so that it can be inverted and noise isn't."""
MEANS_SHRINKAGE = 1.0
"""The same for `discriminants`. Prompts of another form than the experts' own are then told better (docs/method.md)."""
LEAST = 1e-4
"""What it gets at least, where standardised inputs hardly vary: lengths then stay within what float16 can hold."""
_WHITENED_AT_A_TIME = 4096
"""Rows that are whitened at a time, in float64."""
_AT_A_TIME = {"cpu": 1 << 22}
"""Products of inputs with rows that are computed at a time, by the device: what a cache holds."""
_AT_A_TIME_ELSEWHERE = 1 << 26


class ProjectionNorms:
    """‖P_e (u − m)‖ for each of E experts. P_e is [q_e, d]; q_e may differ, and where it is 0 the norm is 0."""

    def __init__(self, matrices: Iterable[Tensor], mean: Tensor | None = None):
        """The matrices are stacked, so that one product serves all experts. mean: m [d]; None: 0."""
        found = [matrix.float() for matrix in matrices]
        self.ranks = [len(matrix) for matrix in found]
        order = sorted(range(len(found)), key=self.ranks.__getitem__)
        self.rows = torch.cat([found[e] for e in order])
        """Those of one rank stand together."""
        alike = [(rank, list(members)) for rank, members in groupby(order, key=self.ranks.__getitem__)]
        self.groups = [(rank, torch.tensor(members)) for rank, members in alike if rank]
        """(rank, the experts that have it), as their rows stand one behind the other."""
        self.mean = None if mean is None else mean.float()
        self._used: Tensor | None = None
        """The rows on the device and in the dtype of the last product."""

    def whitened(self, inputs: Tensor) -> ProjectionNorms:
        """The same for P_e and m of V_e and inputs [N, d], as `whiten` has them."""
        found = copy(self)
        found.rows, mean = whiten(self.rows, self.groups, inputs)
        found._used, found.mean = None, mean.float()
        return found

    def __call__(self, u: Tensor, multiplied_in: torch.dtype | None = None) -> Tensor:
        """[N, d] → [N, E] in float32, or float64 if u is.

        multiplied_in: the dtype of the product. 16 bits are half of the bytes to read, and round norms to 2^-9 of them.
            Rows are kept in the dtype of the first product, and in that of the last. None: that of the result.
        """
        wide = torch.promote_types(u.dtype, torch.float32)
        used = self._in(u.device, multiplied_in or wide)
        if self.mean is not None and self.mean.device != u.device:
            self.mean = self.mean.to(u.device)
        u = (u.to(wide) if self.mean is None else u.to(wide) - self.mean).to(used.dtype)
        if len(self.groups) == 1 and len(self.groups[0][1]) == len(self.ranks):
            return self._norms(u, used, self.groups[0][0], wide)
        norms, start = u.new_zeros(len(u), len(self.ranks), dtype=wide), 0
        for rank, members in self.groups:
            rows = used[start : start + rank * len(members)]
            norms[:, members.to(u.device)] = self._norms(u, rows, rank, wide)
            start += len(rows)
        return norms

    def _in(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rows there, in this dtype."""
        if (used := self._used) is None or used.device != device or used.dtype != dtype:
            used = self.rows.to(device, dtype)
            # Those that were computed are let go unless they are multiplied: a pool of thousands has gigabytes of them.
            if self._used is None:
                self.rows = used
            self._used = used
        return used

    @staticmethod
    def _norms(u: Tensor, rows: Tensor, rank: int, wide: torch.dtype) -> Tensor:
        """Of experts of one rank: u [N, d], rows [n·rank, d] → [N, n]."""
        most = _AT_A_TIME.get(u.device.type, _AT_A_TIME_ELSEWHERE)
        some = max(1, most // (max(1, len(u)) * rank)) * rank
        parts = [(u @ part.T).to(wide).unflatten(1, (-1, rank)).norm(dim=-1) for part in rows.split(some)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def shrunk(inputs: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """The mean of inputs [N, d] and their covariance, with `by` of its mean variance added in every direction, LEAST at
    least: float64 [d] and [d, d]."""
    x = inputs.double()
    covariance = torch.cov(x.T)
    covariance.diagonal().add_((by * covariance.trace() / len(covariance)).clamp(min=LEAST))
    return x.mean(0), covariance


def discriminants(means: Tensor, inputs: Tensor) -> Tensor:
    """C⁻¹(μ_e − m): the directions in which means μ_e differ most from inputs, beside how these vary (Fisher's linear
    discriminant, of each μ_e against all inputs).

    Args:
        means: μ_e of standardised inputs, [E, d].
        inputs: standardised, [N, d]. Their mean is m; their covariance, shrunk by MEANS_SHRINKAGE, is C.

    Returns: float64 [E, d].
    """
    mean, covariance = shrunk(inputs, MEANS_SHRINKAGE)
    found: Tensor = torch.linalg.solve(covariance, (means.to(mean) - mean).T).T
    return found


def whiten(rows: Tensor, groups: Iterable[tuple[int, Tensor]], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that measure an input's part in each V_e where inputs [N, d] vary equally in all directions.

    With the inputs' mean m and their covariance C = R Rᵀ, to which SHRINKAGE of its mean variance is added, LEAST at
    least, a direction v becomes R⁻¹v. Returns P_e = Q_eᵀ R⁻¹ in place of each V_e, with Q_e an orthonormal basis of the
    span of R⁻¹V_eᵀ, and m: ‖P_e (u − m)‖ is the length of the part of R⁻¹(u − m) in that span.

    Args:
        rows: the V_e, each with orthonormal rows, one behind the other, float32 [R, d], those of one rank together.
        groups: (rank, the experts that have it), in that order.

    Returns: float32 [R, d], and float64 [d].
    """
    mean, covariance = shrunk(inputs, SHRINKAGE)
    # P = L⁻¹ V C⁻¹ with L Lᵀ = V C⁻¹ Vᵀ: one product of d × d numbers, and no basis is computed one by one. C and V Vᵀ
    # are well conditioned, by SHRINKAGE and since V's rows are orthonormal.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    found, start = torch.empty_like(rows), 0
    for rank, members in groups:
        end = start + rank * len(members)
        step = max(1, _WHITENED_AT_A_TIME // rank) * rank
        for first in range(start, end, step):
            some = slice(first, min(first + step, end))
            v = rows[some].to(covariance).unflatten(0, (-1, rank))
            turned = v @ inverse
            factor = torch.linalg.cholesky(turned @ v.mT)
            found[some] = torch.linalg.solve_triangular(factor, turned, upper=False).flatten(0, 1).float()
        start = end
    return found, mean


class _ByNorms(ByScores):
    def __init__(self, norms: ProjectionNorms, top_k: int):
        super().__init__(top_k)
        self.norms = norms

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        return self.norms(u)


class _Lag(ByScores):
    """The best by `span_norms` among those whose `arrow_norms` are highest."""

    def __init__(self, arrow_norms: ProjectionNorms, span_norms: ProjectionNorms, settings: LAG):
        super().__init__(min(settings.top_k, settings.first))
        self.arrow_norms, self.span_norms, self.first = arrow_norms, span_norms, settings.first

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        arrows = self.arrow_norms(u)
        # An expert that is switched off must not take one of the first places.
        if context.allowed is not None:
            arrows = arrows.masked_fill(~context.allowed, -torch.inf)
        first = ops.choose(arrows, self.first)[0]
        scores = self.span_norms(u)
        return torch.full_like(scores, -torch.inf).scatter(1, first, scores.gather(1, first))


def standardised_gate(vector: Tensor) -> Tensor:
    """v̄ in float32 [d]. It is computed in float64, since its mean must be zero to the last bit that float32 has."""
    return standardise(vector.double()).float()


class Calibrated(ByScores):
    """Scores by gates, or by weights for experts without a gate, made comparable on a reference text.

    t_e(u) = v̄_eᵀū/√d with a gate, ‖V_eᵀū‖^⅔ without. score_e = (t_e − mean of t_e) / (standard deviation of t_e),
    both taken over the tokens of the reference text. The null candidate's score is 0. Derived in docs/method.md.
    """

    needs_reference = True

    def __init__(
        self,
        candidates: Candidates,
        gates: Sequence[Tensor | None],
        top_k: int,
        needed_by: str,
        narrow: bool = False,
        directions: int | None = None,
    ):
        """
        Args:
            gates: v̄ [d] of each candidate. One that is None is scored by its weights or, if it is the null candidate,
                not at all.
            narrow: project onto the weights' directions in the input's dtype (`ProjectionNorms`).
            directions: onto so many at most, those of the largest singular values; None: onto all.
        """
        super().__init__(top_k)
        self.path = candidates.path
        self.gated = [i for i, gate in enumerate(gates) if gate is not None]
        self.by_weights = [i for i, m in enumerate(candidates.members) if m >= 0 and gates[i] is None]
        self.gates = torch.stack([g for g in gates if g is not None]) if self.gated else None
        self.span_norms: ProjectionNorms | None = None
        if self.by_weights:
            found = signatures(candidates, needed_by, self.by_weights)
            self.span_norms = ProjectionNorms(s.vectors[:directions] for s in found)
        self.narrow = narrow
        self.sums = torch.zeros(3, len(candidates.members), dtype=torch.float64)
        """Over the reference text's tokens: how many there were, and the sums of t and of t²."""
        self._scale: tuple[Tensor, Tensor] | None = None

    def whiten(self, u: Tensor) -> None:
        """Measures lengths in the weights' directions from now on where these inputs [N, d] vary equally in all
        directions (`whiten`). Once, before `observe`."""
        if self.span_norms is not None:
            self.span_norms = self.span_norms.whitened(standardise(u).cpu())

    def observe(self, u: Tensor, ops: Backend) -> None:
        t = self.uncalibrated(u, ops).double().cpu()
        self.sums[0] += len(t)
        self.sums[1] += t.sum(0)
        self.sums[2] += t.square().sum(0)

    def check_observed(self) -> None:
        if not bool((self.sums[0] > 1).all()):
            raise RoutingError(
                f"{self.path} saw fewer than two tokens of the reference text by which scores are compared: "
                "the base's mixture hardly ever asks this expert of its own. Give the experts gates "
                "(`phatgoose gate`), or choose arrow, spectr or lag."
            )

    def uncalibrated(self, u: Tensor, ops: Backend) -> Tensor:
        """t_e(u): [N, d] → [N, candidates], 0 for the null candidate."""
        wide = torch.promote_types(u.dtype, torch.float32)
        t = u.new_zeros((u.shape[0], self.sums.shape[1]), dtype=wide)
        if self.gates is not None:
            if self.gates.device != u.device:
                self.gates = self.gates.to(u.device)
            t[:, self.gated] = ops.gate_scores(u, self.gates)
        if self.span_norms is not None:
            norms = self.span_norms(standardise(u), u.dtype if self.narrow else None).pow(2 / 3)
            if len(self.by_weights) == t.shape[1]:
                return norms
            t[:, self.by_weights] = norms
        return t

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and 1/(standard deviation) of each candidate's t on the reference text: float64 [candidates].

        A t that never varied says nothing about a token. Its scale is 0, and so is its score, as the null candidate's.
        """
        count, total, squares = self.sums
        if not bool((count > 1).all()):
            raise RoutingError(
                f"the router of {self.path} was not shown the reference text, by which scores are compared. Attach it "
                "with route(). If it was, the base doesn't run this module on text alone: make the experts without it, "
                "or choose arrow, spectr or lag, which compare raw scores."
            )
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        varies = deviation > 1e-6 * mean.abs().clamp(min=1e-6)
        return mean, torch.where(varies, 1 / deviation.where(varies, 1.0), 0.0)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        return self.standardised(u, ops)

    def standardised(self, u: Tensor, ops: Backend) -> Tensor:
        """The scores of inputs [N, d], [N, candidates]."""
        return self.on_scale(self.uncalibrated(u, ops))

    def on_scale(self, t: Tensor) -> Tensor:
        """(t − mean)/(standard deviation) of each candidate, [N, candidates]."""
        if (scale := self._scale) is None or scale[0].device != t.device:
            mean, inverse = self.mean_and_scale()
            self._scale = scale = (-mean * inverse).float().to(t.device), inverse.float().to(t.device)
        return torch.addcmul(scale[0].to(t), t, scale[1].to(t))
