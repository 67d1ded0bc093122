"""benchmarks/serving.py in short: `phatgoose serve` processes under load, with and without pools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving_fixtures import random_pool

from conftest import make_model, make_tokenizer, write_base
from phatgoose.models.base.base import Base

ROOT = Path(__file__).parents[2]


@pytest.mark.slow(41)
def test_servers_bear_load_and_the_record_says_how(tmp_path):
    base = Base(make_model("llama"), make_tokenizer(), spec="tiny")
    write_base(base, tmp_path / "base")
    random_pool(base, tmp_path).save(tmp_path / "three")
    command = [
        sys.executable,
        ROOT / "benchmarks" / "serving.py",
        "--base",
        tmp_path / "base",
        "--dtype",
        "float32",
        "--pool",
        tmp_path / "three",
        "--experts",
        "--clients",
        "16",
        "--minutes",
        "0.1",
        "--turn-seconds",
        "3",
        "--vocabulary",
        "300",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").iterdir()
    found = json.loads(file.read_text())["servers"]
    assert list(found) == ["base", "pool three"]
    for server in found.values():
        assert server["failures"] == 0
        assert set(server["statuses"]) == {"200"}
        assert server["requests"] > 0
        assert len(server["turns"]) == 2
        for turn in server["turns"]:
            assert turn["tokens_per_second"] > 0
            assert turn["prompt_tokens_per_second"] > 0
        assert server["resident_mb"][1] - server["resident_mb"][0] < 50
    assert found["base"]["of_the_base"] == 1
    assert found["pool three"]["of_the_base"] > 0
