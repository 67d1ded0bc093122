"""`phatgoose tasks pool` and `phatgoose tasks suite`: what is under a name, without the network."""

from __future__ import annotations

import socket

import pytest

pytest_plugins = ["cli_fixtures"]
POOLS = {"t0-held-in": 36, "flan": 166, "bigbench": 73, "sisters": 37, "sisters-own": 25}
SUITES = {"t0ho": 11, "bbh": 23, "bbl": 24, "bbh-cot-repo": 27, "quickstart": 5, "sisters": 31}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a list needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def listed(run, *arguments):
    """The tables and lines of an answer, apart where a line is empty, each as its lines without the header."""
    result = run("tasks", *arguments)
    assert result.code == 0, result.err
    return [part.splitlines() for part in result.out.rstrip("\n").split("\n\n")]


@pytest.mark.parametrize(("kind", "counts"), [("pool", POOLS), ("suite", SUITES)])
def test_names_with_their_numbers(run, kind, counts):
    ((_, *lines),) = listed(run, kind)
    assert {name: int(count) for name, count in map(str.split, lines)} == counts


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [*(("pool", *p) for p in POOLS.items()), *(("suite", *s) for s in SUITES.items())],
)
def test_one_line_an_entry_with_all_it_reads(run, kind, name, count):
    from phatgoose.tasks.lists.named import pool_entries, suite

    entries = pool_entries(name) if kind == "pool" else suite(name).entries
    (_, *lines), *_ = listed(run, kind, name)
    assert len(lines) == len(entries) == count
    for line, entry in zip(lines, entries, strict=True):
        assert line.split()[0] == entry.name
        assert line.endswith(f"  {' + '.join(entry.specs)}")
        assert entry.note in line


def test_what_differs_is_noted(run):
    noted = {
        ("pool", "t0-held-in", "trec"): "a prompt of ours",
        ("suite", "t0ho", "story_cloze"): "from your own copy",
        ("suite", "bbl", "conlang_translation"): "scored by rougeL",
    }
    for (kind, name, entry), note in noted.items():
        (_, *lines), *_ = listed(run, kind, name)
        assert [line.split()[0] for line in lines if note in line] == [entry]


def test_near_duplicates_that_are_left_out_are_named_with_their_reason(run):
    from phatgoose.tasks.lists.named import pool_excluded

    _, (head, *lines) = listed(run, "pool", "bigbench")
    assert head.split() == ["left", "out", "why"]
    assert {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines} == pool_excluded("bigbench")
    assert len(listed(run, "pool", "flan")) == 1


def test_datasets_a_suite_is_refused_for(run):
    from phatgoose.tasks.lists.named import suite

    for name in ("t0ho", "bbl"):
        _, (line,) = listed(run, "suite", name)
        assert set(line.partition(": ")[2].split(", ")) == suite(name).refuses
    assert len(listed(run, "suite", "bbh")) == 1


@pytest.mark.parametrize(
    ("kind", "name", "meant"), [("pool", "t0-heldin", "t0-held-in"), ("suite", "bbh-cot", "bbh-cot-repo")]
)
def test_an_unknown_name_is_refused_with_a_suggestion(run, kind, name, meant):
    result = run("tasks", kind, name)
    assert result.code == 1
    assert result.out == ""
    assert f"unknown {kind} {name!r}: did you mean {meant!r}" in result.err
