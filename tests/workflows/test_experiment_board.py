"""The live table of an experiment: what it shows in a terminal, what it prints elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from phatgoose.workflows.experiment.board import Board
from phatgoose.workflows.experiment.executors import Step


def steps(*names):
    return [Step(name, "m:f", {}) for name in names]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("phatgoose.workflows.experiment.board.time.monotonic", lambda: now[0])
    return now


def shown(board):
    console = Console(width=120, file=io.StringIO())
    console.print(board)
    return console.file.getvalue().splitlines()


def test_it_counts_what_is_done_runs_waits_and_failed(clock):
    board = Board(Console(file=io.StringIO(), force_terminal=True))
    one, two, three, four = made = steps("train a", "train b", "train c", "train d")
    tell = board.stage("train", made)
    assert shown(board)[1].split() == ["train", "0/4", "0", "0", "0", "s"]
    for step in made:
        tell(step, "queued", "with Ray")
    clock[0] += 5
    tell(one, "running", "node")
    tell(two, "running", "node")
    clock[0] += 2
    tell(two, "failed", "no room")
    table = shown(board)
    assert table[1].split() == ["train", "0/4", "1", "(2", "sent)", "1", "7", "s"]
    assert table[2].split() == ["train", "a", "2", "s"]
    assert "train b: failed: no room" in table[3]
    for step in (one, three, four):
        tell(step, "done", "")
    clock[0] += 60  # a stage that has ended stands still
    assert shown(board)[1].split() == ["train", "3/4", "0", "1", "7", "s"]
    board.stage("sign", steps("sign a"))
    assert [line.split()[:2] for line in shown(board)[1:3]] == [["train", "3/4"], ["sign", "0/1"]]


def test_without_a_terminal_it_prints_a_line_for_every_end(clock):
    console = Console(file=io.StringIO(), width=120)
    with Board(console) as board:
        one, two = made = steps("train a", "train [b]")
        tell = board.stage("train", made)
        tell(one, "running", "worker 1")
        clock[0] += 3
        tell(one, "done", "")
        tell(two, "retry", "it died")
        tell(two, "failed", "it died again")
    assert console.file.getvalue().splitlines() == [
        "train: 2 steps", "  train a: done (3 s)", "  train [b]: retry: it died", "  train [b]: failed: it died again",
    ]  # fmt: skip
