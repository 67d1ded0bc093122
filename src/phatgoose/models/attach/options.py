"""How a pool is attached to a model, whatever pool and router: `RouteOptions`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from phatgoose.errors import RoutingError

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class RouteOptions:
    """The keywords of `route`, as one object that callers hand on.

    Raises:
        RoutingError: `device_memory` is no number of bytes.
    """

    backend: str = "auto"
    """"auto", "cpu", "triton", "torch" or "reference"."""
    dtype: torch.dtype | None = None
    """The dtype of the experts' matrices; None: the one each module computes in."""
    any_base: bool = False
    """Skip the check that the model is the pool's base."""
    device_memory: int | str | None = None
    """Bytes, or "8GB", that the pool may take on the model's devices; None: as much as it needs."""

    def __post_init__(self) -> None:
        if self.device_memory is not None:
            object.__setattr__(self, "device_memory", parse_bytes(self.device_memory))


def parse_bytes(text: int | str) -> int:
    """Bytes: a whole number, or "8GB", "512 MiB", "1.5G".

    Raises:
        RoutingError: it is neither, or less than one.
    """
    found = None
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?I?)B?\s*", text.upper())
        if match is not None and match[2] in _UNITS:
            found = int(float(match[1]) * _UNITS[match[2]])
    elif not isinstance(text, bool):
        found = int(text)
    if found is None or found < 1:
        raise RoutingError(
            f"device_memory is {text!r}, expected bytes, such as 8000000000, '8GB' or '512MiB'."
        )
    return found
