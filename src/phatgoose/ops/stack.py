"""All experts' low-rank rows at one module, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stack:
    """The updates of E experts at one module: expert e owns rows offsets[e]:offsets[e+1] of both matrices.

    A: [R, d_in], B: [R, d_out] (B transposed, each expert's scale folded in), R the sum of the ranks. Ranks differ freely;
    an expert of rank 0 is the null candidate, whose update is zero.
    """

    A: Tensor
    B: Tensor
    offsets: tuple[int, ...]

    @property
    def experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.offsets))

    def rows(self, expert: int) -> slice:
        return slice(self.offsets[expert], self.offsets[expert + 1])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Stack:
        return Stack(self.A.to(device, dtype), self.B.to(device, dtype), self.offsets)


def make_stack(
    parts: Sequence[tuple[Tensor, Tensor, float]], d_in: int, d_out: int, dtype: torch.dtype
) -> Stack:
    """Stacks (A [r, d_in], B [d_out, r], scale) of each expert, in order. The scale is folded into B in float32 or wider.

    `dtype` is that of the stacked matrices: the dtype the model computes in.
    """
    wide = torch.promote_types(dtype, torch.float32)
    offsets = [0]
    rows_a, rows_b = [torch.empty(0, d_in, dtype=dtype)], [torch.empty(0, d_out, dtype=dtype)]
    for a, b, scale in parts:
        offsets.append(offsets[-1] + a.shape[0])
        rows_a.append(a.to(dtype))
        rows_b.append((b.to(wide) * scale).T.to(dtype))
    return Stack(torch.cat(rows_a), torch.cat(rows_b), tuple(offsets))
