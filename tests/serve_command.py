"""`phatgoose serve` as a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(*words, folder: Path | None = None):
    """The address that the command says, on a port that is free; at the end it is interrupted and must end in order."""
    command = [sys.executable, "-m", "phatgoose.cli.main", *map(str, words), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    try:
        address = process.stdout.readline().strip()
        if not address.startswith("http://127.0.0.1:"):
            raise AssertionError(f"no address: {address!r}, {process.communicate(timeout=60)[1]}")
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
