"""Deprecated: `pack` and `unpack` are in `packed.pack`, `verify_folder` is in `pool_folder`."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

_MOVED = {"pack": "packed.pack", "unpack": "packed.pack", "verify_folder": "pool_folder"}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"phatgoose.experts.{_MOVED[name]}"
    warnings.warn(f"{__name__}.{name} is {module}.{name} now", DeprecationWarning, stacklevel=2)
    return getattr(import_module(module), name)
