"""`phatgoose ui` and `phatgoose serve` as processes of their own, which is how they end as well: by Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(*words, folder: Path | None = None, last: str = ""):
    """The address that the command says, on a port that is free; at the end it is interrupted, must end in
    order, and say `last`."""
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
    assert last in said
    assert "Traceback" not in said
