"""Threads that compute and end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

import pytest
import torch

from phatgoose.serving.threads import limit_openmp_spinning, run_in_thread, run_in_thread_async


def compute():
    x = torch.randn(600, 600)
    for _ in range(3):
        x = (x @ x).tanh()
    return x


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("way", ["apart", "away"])
def test_nothing_is_left_of_a_computation(way):
    threads = len(os.listdir("/proc/self/task"))
    found = run_in_thread(compute) if way == "apart" else asyncio.run(run_in_thread_async(compute))
    assert found.shape == (600, 600)
    until = time.monotonic() + 20
    while len(os.listdir("/proc/self/task")) > threads and time.monotonic() < until:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/task")) <= threads
    assert not any(thread.name.startswith("phatgoose-once") for thread in threading.enumerate())


@pytest.mark.parametrize("way", ["apart", "away"])
def test_errors_come_out(way):
    def fails():
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        run_in_thread(fails) if way == "apart" else asyncio.run(run_in_thread_async(fails))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
    ],
)
def test_what_the_environment_says_is_heeded(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    limit_openmp_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    os.environ.pop("GOMP_SPINCOUNT", None)
