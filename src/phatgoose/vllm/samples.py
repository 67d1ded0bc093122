"""A few weights of each module, which show that a layer of vLLM is that module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from phatgoose.fingerprints import ABSOLUTE, RELATIVE
from phatgoose.models.base.fingerprint import sample_positions

SAMPLES = 32


def sample(module: nn.Module, path: str) -> tuple[float, ...]:
    """SAMPLES values of the weight [d_out, d_in] of a linear module, at places that depend only on its path
    and shape."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    flat = torch.tensor(sample_positions(path, weight.shape, SAMPLES))
    return tuple(weight[torch.unravel_index(flat, weight.shape)].float().tolist())


def differing(
    part: Tensor, path: str, expected: tuple[float, ...], rows: range, columns: range, size: tuple[int, int]
) -> str:
    """How `part`, some rows and columns of a module's weight, differs from the samples; "" if by no more than a cast.

    Args:
        size: d_out and d_in of the whole module.
    """
    for flat, value in zip(sample_positions(path, size, SAMPLES), expected, strict=True):
        row, column = divmod(flat, size[1])
        if row not in rows or column not in columns:
            continue
        found = float(part[row - rows.start, column - columns.start])
        if not abs(found - value) <= RELATIVE * max(abs(found), abs(value)) + ABSOLUTE:
            return f"the weight at row {row}, column {column} is {found:.6g}, expected {value:.6g}"
    return ""
