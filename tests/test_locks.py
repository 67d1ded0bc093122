"""One run at a time, and a killed one gives way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phatgoose.errors import StorageError
from phatgoose.locks import only_run


def test_one_run_at_a_time_and_a_killed_one_gives_way(tmp_path):
    lock = tmp_path / ".thing.lock"
    code = "import sys, time; from pathlib import Path; from phatgoose.locks import only_run\n"
    code += "with only_run(Path('thing'), Path(sys.argv[1])): print('at work', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "at work\n"
    with (
        pytest.raises(StorageError, match=r"another run is at work in .*thing"),
        only_run(tmp_path / "thing", lock),
    ):
        pass
    other.kill()
    other.communicate()
    with only_run(tmp_path / "thing", lock):
        assert lock.exists()
    assert not lock.exists()
