"""`phatgoose doctor`."""

from __future__ import annotations

import re

from phatgoose.ops.cpu import build

pytest_plugins = ["cli_fixtures"]


def test_it_says_what_routes_and_why(run, monkeypatch):
    result = run("doctor")
    assert result.code == 0
    assert re.search(r"routing +on CPUs, auto is cpu: compiled kernel, \w+ instructions", result.out)
    assert re.search(r"on GPUs, auto is (triton: Triton 3|torch: )", result.out)
    assert re.search(r"torch +\d+\.\d+", result.out)
    assert str(build.library().path) in result.out


def test_without_a_compiler_it_says_that(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    build.reason.cache_clear()
    try:
        result = run("doctor")
    finally:
        build.library.cache_clear()
        build.reason.cache_clear()
    assert result.code == 0
    assert re.search(r"routing +on CPUs, auto is torch: .*no C\+\+ compiler was found", result.out)
    assert re.search(r"compiler +none", result.out)
    assert f"{tmp_path / 'cache'}, " in result.out
