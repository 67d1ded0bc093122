"""`phatgoose report`."""

from __future__ import annotations

import json

import pytest

pytest_plugins = ["cli_fixtures"]


@pytest.mark.slow(18)
def test_a_page_of_results_and_a_pool(run, ready, base, task, tmp_path):
    folder, _ = ready
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    results = {
        "tasks": [{"name": "x", "group": "g"}],
        "systems": [{"name": "base", "kind": "base", "scores": {"x": interval}}],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    plain = run("report", tmp_path / "results.json", "--out", tmp_path / "plain.html")
    assert plain.code == 0, plain.err
    assert plain.out.strip() == str(tmp_path / "plain.html")
    whole = run(
        "report", tmp_path / "results.json", "--pool", folder / "pool", "--base", base, "--task", task,
        "--prompt", "yes no", "--max-new-tokens", "2", "--out", tmp_path / "whole.html",
    )  # fmt: skip
    assert whole.code == 0, whole.err
    html = (tmp_path / "whole.html").read_text()
    for words in ("Layer by layer", "Token by token", "Nearest gates", "gates, none constant"):
        assert words in html
        assert words not in (tmp_path / "plain.html").read_text()


def test_refusals(run, ready, base, tmp_path):
    folder, _ = ready
    assert run("report").code == 2
    assert run("report", "--prompt", "x", tmp_path / "r.json").code == 2
    missing = run("report", tmp_path / "nothing.json")
    assert (missing.code, "does not exist" in missing.err) == (1, True)
    merged = run("report", "--pool", folder / "pool", "--base", base, "--router", "merged")
    assert (merged.code, "routes to no experts" in merged.err) == (1, True)
