"""State of a running forward pass, which every thread keeps to itself."""

from __future__ import annotations

import threading
from typing import Any


class ForwardState(threading.local):
    """What one module leaves for another during a forward pass. It is a thread's own; copies and pickles are empty."""

    def __reduce__(self) -> Any:
        return type(self), ()
