"""What an expert does at one module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """Δ(u) = scale · B A u, the update of a LoRA expert at one module.

    A: [r, d_in], B: [d_out, r], both as trained (any float dtype).
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        return self.B.shape[0]

    def delta(self, u: Tensor) -> Tensor:
        """Δ(u): [..., d_in] → [..., d_out], computed in the wider dtype of u and the weights."""
        dtype = torch.promote_types(u.dtype, self.A.dtype)
        a, b = (t.to(device=u.device, dtype=dtype) for t in (self.A, self.B))
        return (u.to(dtype) @ a.T) @ b.T * self.scale

    def weight(self) -> Tensor:
        """ΔW = scale · B A: [d_out, d_in] in float32."""
        return self.scale * (self.B.float() @ self.A.float())
