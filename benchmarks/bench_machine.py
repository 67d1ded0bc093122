"""What benchmarks share: interleaved medians, facts about the machine, processes, result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
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
    """Median seconds of each way. The ways take turns, so that a busy moment affects all of them; the first
    round doesn't count.

    Each way is called with the number of the round. `before[name]` prepares it and isn't timed.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            if before is not None:
                before[name]()
            _synchronize()
            start = time.perf_counter()
            run(number)
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_bandwidth(megabytes: int = 1024) -> float:
    """Bytes per second that all threads read from memory: the best of a few sums over more data than any cache
    holds."""
    x = torch.ones(megabytes * 2**18)
    best = min(_seconds(x) for _ in range(5))
    return x.numel() * 4 / best


def _seconds(x: torch.Tensor) -> float:
    start = time.perf_counter()
    x.sum()
    return time.perf_counter() - start


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def in_work_folder(
    prefix: str, parent: Path | None, run: Callable[[Path], dict[str, object]]
) -> dict[str, object]:
    """What `run` returns for a folder that doesn't exist yet, below a new one that is removed at the end."""
    work = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=parent))
    try:
        return run(work / "pool")
    finally:
        shutil.rmtree(work)


def in_new_process(script: str, *arguments: object) -> dict[str, object]:
    """Runs a script in a fresh process; the last line that it prints is its result as JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(result: dict[str, object], out: Path | None) -> None:
    """Prints a result, and writes it to `out` if that is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def machine() -> dict[str, object]:
    """What the numbers depend on, for the results file."""
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
