"""Computing in threads that end.

OpenMP keeps helpers for every thread that ever computed something large, for as long as that thread lives. With more of them than cores,
libgomp's (which PyTorch's Linux packages have) sleep after every step instead of waiting a moment for the next: on two cores a pool's server
then took 1.4 times as long for every pass. So whatever computes beside the engine's thread does it here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def apart(do: Callable[[], T]) -> T:
    """What `do` returns or raises, in a thread that has ended before this returns."""
    with ThreadPoolExecutor(1, "phatgoose-apart") as thread:
        return thread.submit(do).result()


async def away(do: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The same, without holding the event loop up."""
    thread = ThreadPoolExecutor(1, "phatgoose-apart")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, partial(do, *args, **kwargs))
    finally:
        thread.shutdown(wait=False)


def wait_briefly() -> None:
    """Before PyTorch is imported: OpenMP's helpers wait a tenth of a millisecond for their next step, not three, unless the environment says
    otherwise. Helpers that wait take cores from whatever else runs, and from each other: beside other work on two cores, training and
    evaluating a tiny model took ten times as long."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
