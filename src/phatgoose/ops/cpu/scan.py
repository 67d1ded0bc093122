"""Gates in 8 bits, by which the CPU kernel finds out which experts can be among a token's best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16
"""Gates lie side by side in blocks of this many, as kernel/products.h reads them."""
_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Scan:
    """v̄_e = step_e · codes_e + rest with ‖rest‖ ≤ lost_e, and so |score_e − scanned score_e| ≤ lost_e, as ‖ū‖ ≤ √d.

    codes: int8 [⌈E/16⌉, d, 16]. facts: float32 [3, 16⌈E/16⌉], the steps, the sums of the codes, and `lost`, which is ∞ for
    what fills up the last block.
    """

    codes: Tensor
    facts: Tensor


def scan(gates: Tensor) -> Scan:
    """The scan of standardised gates, float32 [E, d]: a quarter of their bytes."""
    experts, d = gates.shape
    blocks = -(-experts // LANES)
    codes = torch.zeros(blocks, d, LANES, dtype=torch.int8)
    # Others' default dtype may be another: vLLM's is its model's while it is made.
    facts = torch.tensor([0.0, 0.0, torch.inf], dtype=torch.float32)[:, None].repeat(1, blocks * LANES)
    for start in range(0, experts, _AT_ONCE):
        some = gates[start : start + _AT_ONCE]
        n = len(some)
        step = some.abs().amax(-1) / 127
        code = (some / step.where(step > 0, 1)[:, None]).round().clamp(-127, 127)
        lost = (some.double() - step.double()[:, None] * code).norm(
            dim=-1
        ) * 1.0001  # room for its own rounding
        facts[:, start : start + n] = torch.stack([step, code.sum(-1), lost.float()])
        padded = torch.nn.functional.pad(code.to(torch.int8), (0, 0, 0, -n % LANES))
        codes[start // LANES : -(-(start + n) // LANES)] = padded.view(-1, LANES, d).transpose(1, 2)
    return Scan(codes, facts)
