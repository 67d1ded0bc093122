"""Ten thousand changed files for every reader, and a check that what goes wrong would be seen.
`make fuzz` runs a million."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("fuzz_run.py")


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, RUN, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=1500,
    )


@pytest.mark.slow(60)
def test_ten_thousand_changed_files_are_read_or_refused():
    found = run("--count", "10000")
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-3000:]
    tallies = re.findall(r"^([\w-]+) +(\d+) inputs +\d+/s +\{(.*)\}", found.stdout, re.MULTILINE)
    assert len(tallies) >= 15
    assert sum(int(count) for _, count, _ in tallies) >= 10_000
    for name, _, tally in tallies:  # a target that refuses everything, or nothing, tests little
        if name not in ("json", "fingerprint"):  # which swallow their own errors
            assert "'refused': " in tally, name
        assert "'read': " in tally or name == "place", name


@pytest.mark.slow(18)
def test_what_goes_wrong_is_found_and_the_rest_goes_on():
    found = run("--targets", "broken", "--count", "200", FUZZ_SECONDS="0.5")
    assert found.returncode == 1
    for kind in (
        r"ValueError in fuzz_targets.py:\d+ _broken",
        r"MemoryError in fuzz_targets.py:\d+ _broken",
        r"broken: the process ended with -11",
        r"broken: hangs",
        r"broken: a message of more than 4000 characters",
        r"broken: a message that can't be written",
    ):
        assert re.search(rf"^\d+ × {kind}", found.stdout, re.MULTILINE), found.stdout
    assert "200 inputs in" in found.stdout
    number = re.search(r"ValueError in .*\n.*--only (broken:\d+)", found.stdout)[1]
    again = run("--only", number)
    assert "ValueError: unforeseen" in again.stdout


@pytest.mark.slow(6)
def test_inputs_depend_on_nothing_but_their_number(tmp_path):
    files = []
    for name in ("one", "two"):
        assert run("--only", "weights:7", "--keep", str(tmp_path / name)).returncode == 0
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
