"""Run one-off work in short-lived threads.

OpenMP keeps a set of worker threads for every thread that ever computed something large, for as long as that thread
lives. With more of them than cores, libgomp's (used by PyTorch's Linux packages) sleep after every step instead of
spinning briefly until the next: on two cores, each pass of a pool's server then took 1.4 times as long. So whatever
computes outside the engine's thread runs in a thread that ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_thread(do: Callable[[], T]) -> T:
    """Runs `do` in a new thread, which has ended when this returns; gives or raises what `do` does."""
    with ThreadPoolExecutor(1, "phatgoose-once") as thread:
        return thread.submit(do).result()


async def run_in_thread_async(do: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The same without blocking the event loop."""
    thread = ThreadPoolExecutor(1, "phatgoose-once")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, partial(do, *args, **kwargs))
    finally:
        thread.shutdown(wait=False)


def limit_openmp_spinning() -> None:
    """Makes OpenMP's threads spin for 0.1 ms before they sleep, not 3 ms. Call it before PyTorch is imported.

    Spinning threads take cores from everything else: next to other work on two cores, training and evaluating a tiny
    model took ten times as long. The environment's own OMP_WAIT_POLICY and GOMP_SPINCOUNT have precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
