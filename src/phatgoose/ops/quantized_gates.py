"""Gates in 8 or 16 bits, which rule out most experts of a token before exact scoring."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.ops.reference import EPS

MAX_MEAN_ERROR = 0.25
"""If 8 bits leave a score in doubt by more than this on average, 8 more bits are kept. Scores of random gates
have deviation 1. Every expert in doubt costs a float32 gate, fetched from the host. Doubt grows as √d: 0.22 at
d = 576, 0.6 at 4096, 1.1 at 14336."""
CHUNK_VALUES = 1 << 22
"""Temporary matrices have about this many values, so that memory beside the gates is bounded."""
LANES = 16
"""The CPU kernel reads gates in blocks of this many, side by side (cpu/kernel/products.h)."""


@dataclass(frozen=True, eq=False)
class QuantizedGates:
    """v̄_e = Σ_p step_pe · codes_pe + rest, with ‖rest‖ ≤ error_e.

    So |score_e − quantized score_e| ≤ error_e, since ‖ū‖ ≤ √d. codes: int8 [P, E, d]. steps: float32 [P, E].
    error: float32 [E].
    """

    codes: Tensor
    steps: Tensor
    error: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.steps.nbytes + self.error.nbytes

    def to(self, device: torch.device) -> QuantizedGates:
        return QuantizedGates(self.codes.to(device), self.steps.to(device), self.error.to(device))

    def leaders(self, x: Tensor, k: int) -> Tensor:
        """The experts that may be among a token's best k ≤ E: bool [N, E], at least k for each token.

        A token whose input isn't finite has none. x: `standardised` inputs [N, d]. Whatever `exact_scores`
        finds best is always included; of equal scores, the lower indices.
        """
        narrow = x.float()
        scores, doubt = self.scores(narrow), self.error + self.rounding(x.device)
        least = (scores - doubt).topk(k, dim=-1).values[:, -1:]
        # Padding is often all zero. All its scores are 0, which would leave every expert in doubt; the first
        # k are chosen.
        nothing = (narrow == 0).all(-1, keepdim=True)
        first = torch.arange(scores.shape[1], device=x.device) < k
        return torch.where(nothing, first, scores + doubt >= least)

    def scores(self, x: Tensor) -> Tensor:
        """Scores by the quantized gates: standardised float32 [N, d] → [N, E]."""
        _, experts, d = self.codes.shape
        scores = x.new_empty(x.shape[0], experts)
        chunk = max(1, CHUNK_VALUES // d)
        for start in range(0, experts, chunk):
            some = slice(start, start + chunk)
            scores[:, some] = sum(
                (x @ codes[some].to(x.dtype).T) * steps[some]
                for codes, steps in zip(self.codes, self.steps, strict=True)
            )
        scale: float = d**-0.5
        return scores * scale

    def rounding(self, device: torch.device) -> float:
        """How far rounding can carry `scores` from the exact product.

        d products and sums are off by at most d 2⁻²⁴ ‖v̄‖ ‖ū‖, in whatever order they are added; the score is
        that over √d.
        """
        d = self.codes.shape[-1]
        norm: float = d**0.5
        return 1.1 * norm * ((d + 16) * 2.0**-24 + _factor_rounding(device))


def quantize(gates: Tensor, planes: int | None = None) -> QuantizedGates:
    """Standardised gates, float32 [E, d], in `planes` times 8 bits; None: 8, or 16 if 8 leave too much in doubt."""
    if planes is None:
        one = quantize(gates, 1)
        return one if not len(gates) or float(one.error.mean()) <= MAX_MEAN_ERROR else quantize(gates, 2)
    experts, d = gates.shape
    codes = torch.empty(planes, experts, d, dtype=torch.int8, device=gates.device)
    steps = torch.empty(planes, experts, dtype=torch.float32, device=gates.device)
    error = torch.empty(experts, dtype=torch.float32, device=gates.device)
    chunk = max(1, min(CHUNK_VALUES, 1 << 17) // d)  # so few gates at a time stay in the processor's cache
    for start in range(0, experts, chunk):
        some = slice(start, start + chunk)
        rest = gates[some]
        for p in range(planes):
            step = (rest.abs().amax(-1) / 127).float()
            code = (rest / step.where(step > 0, 1)[:, None]).round().clamp(-127, 127)
            # Exact: the error is that of these very codes.
            rest = rest.double() - step.double()[:, None] * code
            codes[p, some], steps[p, some] = code.to(torch.int8), step
        error[some] = (rest.norm(dim=-1) * 1.0001).float()  # room for its own rounding, and for that of ū
    return QuantizedGates(codes, steps, error)


def kernel_gates(gates: Tensor) -> list[Tensor]:
    """Standardised gates, float32 [E, d], as the CPU kernel scans them: the gates, their 8-bit codes, and
    facts about these.

    codes: int8 [⌈E/16⌉, d, 16]. facts: float32 [3, 16⌈E/16⌉]: the steps, the sums of the codes, and the error,
    which is ∞ for what fills up the last block.
    """
    quantized, (experts, d) = quantize(gates, 1), gates.shape
    blocks = -(-experts // LANES)
    padding = blocks * LANES - experts
    codes = F.pad(quantized.codes[0], (0, 0, 0, padding)).view(blocks, LANES, d).transpose(1, 2).contiguous()
    sums = quantized.codes[0].sum(-1).float()
    facts = F.pad(torch.stack([quantized.steps[0], sums, quantized.error]), (0, padding))
    facts[2, experts:] = torch.inf
    return [gates, codes, facts]


def standardised(u: Tensor) -> Tensor:
    """ū of inputs [N, d] in float64, where the device has it: a mean far from zero costs float32 digits."""
    wide = torch.float32 if u.device.type == "mps" else torch.float64
    return F.layer_norm(u.to(wide), u.shape[-1:], eps=EPS)


def exact_scores(x: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
    """v̄_eᵀ ū / √d, rounded once: `standardised` [N, d], float32 [E, d] → [N, E].

    So equal gates have equal scores, which a product in float32 doesn't promise.
    """
    scale: float = x.shape[-1] ** -0.5
    return (x @ gates.to(x.dtype).T * scale).to(dtype)


_UNIT = {"none": 0.0, "ieee": 0.0, "highest": 0.0, "tf32": 2.0**-10, "high": 2.0**-10}


def _factor_rounding(device: torch.device) -> float:
    """The relative rounding of factors of float32 products that torch is set to. None of them rounds codes."""
    settings = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    kept = getattr(getattr(settings, "matmul", None), "fp32_precision", None)  # since torch 2.9
    return _UNIT.get(kept or torch.get_float32_matmul_precision(), 2.0**-8)
