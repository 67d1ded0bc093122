"""Gates in 8 bits (or twice 8) on a device, and the experts that they can't rule out of a token's best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.ops.reference import EPS

ENOUGH = 0.25
"""Where 8 bits leave a score in doubt by more than this (scores of random gates have deviation 1), 8 more bits are kept: every expert
in doubt costs a float32 gate, fetched from the host. Doubt grows as √d: 0.22 at d = 576, 0.6 at 4096, 1.1 at 14336."""
AT_ONCE = 1 << 22
"""Values of a temporary matrix."""


@dataclass(frozen=True, eq=False)
class Coarse:
    """v̄_e = Σ_p step_pe · codes_pe + rest with ‖rest‖ ≤ lost_e, so |score_e − coarse score_e| ≤ lost_e, as ‖ū‖ ≤ √d.

    codes: int8 [P, E, d]. steps: float32 [P, E]. lost: float32 [E].
    """

    codes: Tensor
    steps: Tensor
    lost: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.steps, self.lost))

    def to(self, device: torch.device) -> Coarse:
        return Coarse(self.codes.to(device), self.steps.to(device), self.lost.to(device))

    def leaders(self, x: Tensor, k: int) -> Tensor:
        """The experts that may be among a token's best k ≤ E: bool [N, E], at least k for each token, none where it isn't finite.

        x: `standardised` inputs [N, d]. Whatever `exact_scores` finds best, of equal ones the lower index, is always there.
        """
        narrow = x.float()
        scores, doubt = self._scores(narrow), self.lost + self._rounding(x.device)
        least = (scores - doubt).topk(k, dim=-1).values[:, -1:]
        # Padding is often all zero, and would leave every expert in doubt, where all scores are 0 and the first k are chosen.
        nothing = (narrow == 0).all(-1, keepdim=True)
        first = torch.arange(scores.shape[1], device=x.device) < k
        return torch.where(nothing, first, scores + doubt >= least)

    def _scores(self, x: Tensor) -> Tensor:
        _, experts, d = self.codes.shape
        scores = x.new_empty(x.shape[0], experts)
        each = max(1, AT_ONCE // d)
        for start in range(0, experts, each):
            some = slice(start, start + each)
            scores[:, some] = sum(
                (x @ codes[some].to(x.dtype).T) * steps[some]
                for codes, steps in zip(self.codes, self.steps, strict=True)
            )
        return scores * d**-0.5

    def _rounding(self, device: torch.device) -> float:
        """How far rounding can carry this score: d products and sums are off by at most d 2⁻²⁴ ‖v̄‖ ‖ū‖, in whatever order; over √d."""
        d = self.codes.shape[-1]
        return 1.1 * d**0.5 * ((d + 16) * 2.0**-24 + _input_rounding(device))


def coarse(gates: Tensor) -> Coarse:
    """Of standardised gates, float32 [E, d]: a quarter of their bytes, or half."""
    one = _coded(gates, 1)
    return one if not one.lost.numel() or float(one.lost.mean()) <= ENOUGH else _coded(gates, 2)


def _coded(gates: Tensor, planes: int) -> Coarse:
    experts, d = gates.shape
    codes = torch.empty(planes, experts, d, dtype=torch.int8, device=gates.device)
    steps = torch.empty(planes, experts, dtype=torch.float32, device=gates.device)
    lost = torch.empty(experts, dtype=torch.float32, device=gates.device)
    each = max(1, AT_ONCE // d)
    for start in range(0, experts, each):
        some = slice(start, start + each)
        rest = gates[some].double()
        for p in range(planes):
            step = (rest.abs().amax(-1) / 127).float()
            code = (rest / step.double().where(step > 0, 1)[:, None]).round().clamp(-127, 127)
            rest = rest - step.double()[:, None] * code
            codes[p, some], steps[p, some] = code.to(torch.int8), step
        lost[some] = (rest.norm(dim=-1) * 1.0001).float()  # room for its own rounding, and for that of ū
    return Coarse(codes, steps, lost)


def standardised(u: Tensor) -> Tensor:
    """ū of inputs [N, d], in float64: a mean far from zero costs float32 digits."""
    wide = torch.float32 if u.device.type == "mps" else torch.float64  # which has no float64
    return F.layer_norm(u.to(wide), u.shape[-1:], eps=EPS)


def exact_scores(x: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
    """v̄_eᵀ ū / √d, rounded once: `standardised` [N, d], float32 [E, d] → [N, E]. So equal gates have equal scores, which a product
    in float32 doesn't promise."""
    return (x @ gates.to(x.dtype).T * x.shape[-1] ** -0.5).to(dtype)


_UNIT = {"none": 0.0, "ieee": 0.0, "highest": 0.0, "tf32": 2.0**-10, "high": 2.0**-10}


def _input_rounding(device: torch.device) -> float:
    """How torch was told to round factors of float32 products; codes are exact in whatever it is."""
    place = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    kept = getattr(getattr(place, "matmul", None), "fp32_precision", None)  # since torch 2.9
    return _UNIT.get(kept or torch.get_float32_matmul_precision(), 2.0**-8)
