import io
import sys

from phatgoose.training.progress import Progress, display, plain, silent


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
    plain(at(0, loss=None, rows_per_second=0.0, seconds_left=float("inf")))
    assert capsys.readouterr().err == "expert x: 0/50\n"


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
