import io
import sys

from phatgoose.training.trainer import progress
from phatgoose.training.trainer.progress import Progress, display, lines, silent


def at(step: int, **more) -> Progress:
    values = {"loss": 1.5, "validation_loss": None, "rows_per_second": 12.3, "seconds_left": 75.0}
    return Progress("expert x", step, 50, **{**values, **more})


def test_lines_at_every_tenth(capsys):
    with display("expert x", 50) as show:
        for step in range(51):
            show(at(step))
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 11
    assert "expert x: 5/50, loss 1.500, 12.3 rows/s, 1:15 left" in err


def test_before_the_first_step(capsys):
    lines()(at(0, loss=None, rows_per_second=0.0, seconds_left=float("inf")))
    assert capsys.readouterr().err == "expert x: 0/50\n"


def test_a_step_that_takes_long_is_not_silent(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    show = lines()
    for now[0], part in ((15, 0.1), (30, 0.2), (61, 0.4), (76, 0.5), (122, 0.8)):
        show(at(0, part=part, loss=None))
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [
        f"expert x: 0/50 and {p} % of a step".replace(" %", "%") for p in (40, 80)
    ]


def test_silence(capsys):
    silent(at(50))
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with display("expert x", 50) as show:
        show(at(20, validation_loss=0.25))
        show(at(50))
    assert "expert x" in terminal.getvalue()
    assert "50/50, loss 1.500" in terminal.getvalue()
