"""Measure how much memory is available."""

from __future__ import annotations

from pathlib import Path

import psutil

_CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_bytes() -> int:
    """Bytes that can still be allocated without swapping, at most what the container allows in all, if there is one."""
    free = int(psutil.virtual_memory().available)
    for limit in _CONTAINER:
        try:
            free = min(free, int(limit.read_text()))
        except (OSError, ValueError):  # no container, or one without a limit ("max")
            continue
    return free
