"""State that lives only while a pass runs."""

from __future__ import annotations

import threading
from typing import Any


class Running(threading.local):
    """What one module of a running pass leaves for another. Every thread has its own, and copies and pickles begin without any."""

    def __reduce__(self) -> Any:
        return type(self), ()
