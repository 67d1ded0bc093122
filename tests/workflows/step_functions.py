"""Steps that end in every way there is; imported by worker processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from phatgoose.errors import PhatgooseError


def double(x: int) -> int:
    return 2 * x


def process_number() -> int:
    time.sleep(0.05)
    return os.getpid()


def slow(seconds: float) -> None:
    time.sleep(seconds)


def threads() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def refuse(folder: str) -> None:
    _count(folder)
    raise PhatgooseError("this can't be done: try another way")


def fail_once(folder: str) -> str:
    if _count(folder) == 1:
        raise OSError("the disk hiccuped")
    return "second time"


def die(folder: str, times: int) -> str:
    """Killed from outside, `times` times."""
    if _count(folder) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def _count(folder: str) -> int:
    Path(folder).mkdir(exist_ok=True)
    number = len(list(Path(folder).iterdir())) + 1
    (Path(folder) / str(number)).touch()
    return number


def linger(folder):
    """Writes its process id there, then takes its time."""
    Path(folder, "pid.part").write_text(str(os.getpid()))
    Path(folder, "pid.part").rename(Path(folder, "pid"))
    time.sleep(120)
