"""What every measurement shares: interleaved medians, and what there is to know about the machine and the code."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from phatgoose.ops import auto_is


def medians(
    ways: Mapping[str, Callable[[int], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Seconds of each way, the ways taking turns so that a busy moment hits all alike; the first round doesn't count.

    Each is called with the number of the round. `before[name]` makes the way ready, and isn't timed.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            if before is not None:
                before[name]()
            _wait()
            start = time.perf_counter()
            run(number)
            _wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_bandwidth(megabytes: int = 1024) -> float:
    """Bytes per second that this many threads read from memory: the best of a few sums over more than any cache holds."""
    x = torch.ones(megabytes * 2**18)
    best = min(_seconds(x) for _ in range(5))
    return x.numel() * 4 / best


def _seconds(x: torch.Tensor) -> float:
    start = time.perf_counter()
    x.sum()
    return time.perf_counter() - start


def machine() -> dict[str, object]:
    """Everything that a number depends on, for the results file."""
    kind, why = auto_is()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src")),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "auto": f"{kind}: {why.partition(' (')[0]}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "auto on GPUs": ": ".join(auto_is("cuda")),
        "versions": {name: version(name) for name in ("phatgoose", "torch", "transformers", "peft")},
        "python": platform.python_version(),
    }


def _git(*command: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
