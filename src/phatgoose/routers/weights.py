"""Routers that score tokens by an expert's weights: no data, no training.

V is the matrix of right-singular vectors of an expert's ΔW, S its singular values, u a token's input of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts.weight_signature import Signature, signature, why_no_signature
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
        found = signatures(candidates, type(self).__name__)
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


def signatures(candidates: Candidates, needed_by: str, which: Sequence[int] | None = None) -> list[Signature]:
    """The weight signatures of the candidates at these indices (None: of all). The null candidate's is empty.

    Raises:
        RoutingError: an expert's update has no signature; the message names the expert.
    """
    found = []
    for index in range(len(candidates.members)) if which is None else which:
        update, member = candidates.updates[index], candidates.members[index]
        if update is None:
            nothing = torch.zeros(0, candidates.d_in, dtype=torch.float64)
            found.append(Signature(nothing.new_zeros(0), nothing))
        elif (reason := why_no_signature(update)) is not None:
            raise RoutingError(
                f"expert {candidates.names[member]!r} has no signature in its weights at {candidates.path}, "
                f"which {needed_by} needs: {reason}. Give it gates with `phatgoose gate` (--generated needs "
                "no data), or choose another router."
            )
        else:
            found.append(signature(update))
    return found


SHRINKAGE = 0.3
"""How much of its mean variance a covariance gets in every direction, so that it can be inverted and noise isn't."""
LEAST = 1e-4
"""What it gets at least, where standardised inputs hardly vary: lengths then stay within what float16 can hold."""


class ProjectionNorms:
    """‖P_e (u − m)‖ for each of E experts. P_e is [q_e, d]; q_e may differ, and where it is 0 the norm is 0."""

    def __init__(self, matrices: Sequence[Tensor], mean: Tensor | None = None):
        """The matrices are stacked, so that one product serves all experts. mean: m [d]; None: 0."""
        self.rows = torch.cat(list(matrices)).float()
        self._used = self.rows
        """The rows on the device and in the dtype of the last product."""
        self.mean = None if mean is None else mean.float()
        self.ranks = ranks = [len(m) for m in matrices]
        self.rank = ranks[0] if len(set(ranks)) == 1 else 0
        # [rows, E]: 1 where the expert owns the row.
        owners = torch.eye(0 if self.rank else len(ranks), dtype=torch.float32)
        self.owners = owners if self.rank else torch.repeat_interleave(owners, torch.tensor(ranks), dim=0)

    def __call__(self, u: Tensor, multiplied_in: torch.dtype | None = None) -> Tensor:
        """[N, d] → [N, E] in float32, or float64 if u is.

        multiplied_in: the dtype of the product, in which a copy of the rows is kept. 16 bits are half of the bytes to
        read, and round norms to 2^-9 of them. None: that of the result.
        """
        wide = torch.promote_types(u.dtype, torch.float32)
        dtype = multiplied_in or wide
        if self.owners.device != u.device:
            self.owners = self.owners.to(u.device)
            self.mean = None if self.mean is None else self.mean.to(u.device)
        if (used := self._used).device != u.device or used.dtype != dtype:
            self._used = used = self.rows.to(u.device, dtype)  # of the exact ones: a model may be cast back
        u = u.to(wide) if self.mean is None else u.to(wide) - self.mean
        found = (u.to(dtype) @ used.T).to(wide)
        if self.rank:
            norms: Tensor = found.reshape(len(u), -1, self.rank).norm(dim=-1)
            return norms
        return (found.square() @ self.owners.to(wide)).sqrt()


def whitened(vectors: Sequence[Tensor], inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Rows that measure an input's part in each V_e [q_e, d] where inputs [N, d] vary equally in all directions.

    With the inputs' mean m and their covariance C = R Rᵀ, to which SHRINKAGE of its mean variance is added, LEAST at
    least, a direction v becomes R⁻¹v. Returns P_e = Q_eᵀ R⁻¹ [q_e, d] for each expert, with Q_e an orthonormal basis of
    the span of R⁻¹V_eᵀ, and m, in float64: ‖P_e (u − m)‖ is the length of the part of R⁻¹(u − m) in that span.
    """
    x = inputs.double()
    mean, covariance = x.mean(0), torch.cov(x.T)
    d = len(covariance)
    covariance.diagonal().add_((SHRINKAGE * covariance.trace() / d).clamp(min=LEAST))
    root = torch.linalg.cholesky(covariance)
    found = []
    for rows in vectors:
        turned = torch.linalg.solve_triangular(root, rows.to(x).T, upper=False)
        span = torch.linalg.qr(turned).Q
        found.append(torch.linalg.solve_triangular(root.T, span, upper=True).T)
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
    ):
        """
        Args:
            gates: v̄ [d] of each candidate. One that is None is scored by its weights or, if it is the null candidate,
                not at all.
            narrow: project onto the weights' directions in the input's dtype (`ProjectionNorms`).
        """
        super().__init__(top_k)
        self.path = candidates.path
        self.gated = [i for i, gate in enumerate(gates) if gate is not None]
        self.by_weights = [i for i, m in enumerate(candidates.members) if m >= 0 and gates[i] is None]
        self.gates = torch.stack([g for g in gates if g is not None]) if self.gated else None
        found = signatures(candidates, needed_by, self.by_weights)
        self.span_norms = ProjectionNorms([s.vectors for s in found]) if found else None
        self.narrow = narrow
        self.sums = torch.zeros(3, len(candidates.members), dtype=torch.float64)
        """Over the reference text's tokens: how many there were, and the sums of t and of t²."""
        self._scale: tuple[Tensor, Tensor] | None = None

    def whiten(self, u: Tensor) -> None:
        """Measures lengths in the weights' directions from now on where these inputs [N, d] vary equally in all
        directions (`whitened`). Once, before `observe`."""
        if (plain := self.span_norms) is not None:
            self.span_norms = ProjectionNorms(*whitened(plain.rows.split(plain.ranks), standardise(u).cpu()))

    def observe(self, u: Tensor, ops: Backend) -> None:
        t = self.uncalibrated(u, ops).double().cpu()
        self.sums += torch.stack([torch.ones_like(t), t, t.square()]).sum(1)

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
                f"the router of {self.path} was not shown the reference text: attach it with route()."
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
        if self._scale is None or self._scale[0].device != t.device:
            mean, inverse = (x.float().to(t.device) for x in self.mean_and_scale())
            self._scale = mean, inverse
        return (t - self._scale[0]) * self._scale[1]
