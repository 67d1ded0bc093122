"""`phatgoose explain` and what `phatgoose chat --trace` shows."""

from __future__ import annotations

import json

pytest_plugins = ["cli_fixtures"]


def test_explain_in_words_and_as_json(run, ready, base):
    folder, _ = ready
    common = ["explain", "what is the colour of red number 1?", "--pool", folder / "pool", "--base", base]
    common += ["--max-new-tokens", "3"]
    said = run(*common)
    assert said.code == 0, said.err
    assert "the experts make this answer" in said.out
    assert "(base alone)" in said.out
    told = run(*common, "--json", "--most", "1")
    data = json.loads(told.out)
    assert data["format"] == "phatgoose-explanation/1"
    assert [e["expert"] for e in data["effects"]] in (["one"], ["two"])
    assert data["left_out"] == 1
    assert data["effects"][0]["change"] == data["effects"][0]["without"] - data["log_likelihood"]


def test_explain_refuses(run, ready, base):
    folder, _ = ready
    pool = ["--pool", folder / "pool", "--base", base]
    for router, words in (
        ("base", "no experts to leave out"),
        ("merged", "no experts to leave out"),
        ("random", "can't be switched off"),
    ):
        result = run("explain", "x", *pool, "--router", router)
        assert result.code == 1
        assert words in result.err
    assert run("explain", " ", *pool).code == 2


def test_chat_shows_who_led(run, ready, base):
    folder, _ = ready
    common = ["chat", "--pool", folder / "pool", "--base", base, "--raw", "--max-new-tokens", "4"]
    plain = run(*common, input="yes no\n")
    shown = run(*common, "--trace", input="yes no\n/router base\nyes\n/quit\n")
    assert shown.code == 0, shown.err
    assert " %" in shown.err
    assert shown.out.startswith(plain.out.rstrip("\n"))
    assert shown.err.count("router: base") == 1
    switched = run(*common, input="/trace\nyes no\n/trace\nyes no\n")
    assert "experts are shown" in switched.err
    assert "experts are hidden" in switched.err
    assert " %" in switched.err
