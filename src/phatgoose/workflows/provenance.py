"""When, with which packages and on which machine results were made."""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phatgoose.extras import installed_versions


def made(seconds: float) -> dict[str, Any]:
    """The record "made" of results.json; `seconds` is this run's own time, without what an earlier run had finished."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **installed_versions("phatgoose", "torch", "transformers", "peft"),
        "machine": f"{platform.machine()}, {_processor()}, {_cores()} cores",
        "seconds": round(seconds, 1),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"
