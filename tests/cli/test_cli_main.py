"""The entry point: quick help, suggestions, exit codes; and what needs no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import cli as docs
from phatgoose.cli.common import expand, options
from phatgoose.training.config import ExpertConfig, GateConfig

pytest_plugins = ["cli_fixtures"]


def python(code, **environment):
    run = [sys.executable, "-c", code]
    return subprocess.run(run, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_help_imports_nothing_slow():
    code = """
import sys
from phatgoose.cli.main import main
sys.argv = ["phatgoose", "train", "--help"]
try:
    main()
except SystemExit as end:
    slow = {"torch", "transformers", "peft", "datasets", "numpy"} & set(sys.modules)
    print("slow:", sorted(slow), "code:", end.code)
"""
    result = python(code)
    assert "slow: [] code: 0" in result.stdout, result.stderr


def test_main_sets_the_environment_and_ends_with_the_code():
    code = """
import os, sys
from phatgoose.cli.main import main
sys.argv = ["phatgoose", "tasks", "show", "nothing"]
try:
    main()
finally:
    print(os.environ.get("TRANSFORMERS_VERBOSITY"))
"""
    result = python(code, TRANSFORMERS_VERBOSITY="info")
    assert result.returncode == 1
    assert result.stdout.strip() == "info"  # the user's wish goes first
    assert result.stderr.startswith("error: task spec 'nothing'")
    assert len(result.stderr.splitlines()) == 1
    debug = python(code, PHATGOOSE_DEBUG="1")
    assert "Traceback" in debug.stderr
    assert "TaskError" in debug.stderr


def test_version(run):
    from phatgoose import __version__

    assert run("--version").out == f"phatgoose {__version__}\n"


def test_a_misspelt_command_is_suggested(run):
    result = run("trian")
    assert result.code == 2
    assert "train" in result.err
    assert "verify" in run("pool", "verfy").err


def commands():
    from phatgoose.cli.main import app

    def walk(typer_app):
        if typer_app.registered_callback:
            yield typer_app.registered_callback.callback
        for command in typer_app.registered_commands:
            yield command.callback
        for group in typer_app.registered_groups:
            yield from walk(group.typer_instance)

    return list(walk(app))


def test_every_parameter_has_help():
    found = [(c, p) for c in commands() for p in docs.parameters(c)]
    assert len(found) > 80
    for command, parameter in found:
        assert parameter.info.help, (command, parameter.name)


def test_every_command_has_help(run):
    from phatgoose.cli.main import app

    for command in app.registered_commands:
        assert command.callback.__doc__
        assert run(command.name, "--help").code == 0


@pytest.mark.parametrize(("name", "config"), [("train", ExpertConfig), ("gate", GateConfig)])
def test_every_setting_is_an_option_with_its_docstring(run, name, config):
    from dataclasses import fields

    from phatgoose.cli.contribute import gate, train

    found = {p.name: p for p in docs.parameters({"train": train, "gate": gate}[name].command)}
    for field in fields(config):
        assert field.name in found, field.name
        assert getattr(found[field.name].default, "value", found[field.name].default) == field.default
        assert expand.field_docs(config)[field.name] in found[field.name].info.help
    assert expand.field_docs(GateConfig)["steps"] == "Updates of the gates."


@dataclass(frozen=True)
class Some(expand.Options):
    """Options in both ways to declare them."""

    plain: bool = False
    """In [brackets]."""
    limited: Annotated[int | None, typer.Option(min=1)] = None
    """At least 1."""
    hidden: Annotated[bool, typer.Option(hidden=True)] = False
    """Off, as `plain` is."""
    on: bool = True
    """On."""
    named: Annotated[bool, typer.Option("--this/--that", help="Its own.")] = False


@dataclass(frozen=True)
class Mute(expand.Options):
    """Options without help."""

    first: int = 0
    second: int = 0
    """The second."""


def test_options_are_declared_by_fields():
    app, run, got = typer.Typer(), CliRunner(), []

    @app.command()
    @expand.expand_options
    def command(some: Some) -> None:
        got.append(some)

    assert run.invoke(app, ["--plain", "--limited", "2", "--hidden", "--no-on", "--this"]).exit_code == 0
    assert run.invoke(app, []).exit_code == 0
    assert got == [Some(True, 2, True, False, True), Some()]
    for wrong in (["--no-plain"], ["--no-hidden"], ["--limited", "0"]):
        assert run.invoke(app, wrong).exit_code == 2
    shown = run.invoke(app, ["--help"]).stdout
    assert "In [brackets]." in shown
    assert "hidden" not in shown


def test_a_field_without_help_is_named():
    def command(mute: Mute) -> None:
        pass

    with pytest.raises(TypeError, match=r"Mute\.first: write its help as a docstring below it"):
        expand.expand_options(command)


def test_the_default_base_and_the_aliases_are_the_librarys():
    from phatgoose.models.base.load import ALIASES, DEFAULT_BASE

    assert options.DEFAULT_BASE == DEFAULT_BASE
    assert all(alias in options.BASE_HELP for alias in ALIASES)


def test_the_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == docs.markdown(), "run python docs/generate/cli.py"


def test_docs_check(tmp_path, capsys):
    folder = tmp_path / "docs"
    assert docs.main(["--check", str(folder)]) == 1
    assert docs.main([str(folder)]) == 0
    assert docs.main(["--check", str(folder)]) == 0
    text = (folder / "cli.md").read_text()
    assert "| `--rank N` |" in text
    assert "`--chat/--raw`" in text
    assert "`--smoke`" in text
    assert "`POOL`" in text
    for name in ("cli.md", "pools-and-suites.md"):
        written = (folder / name).read_text()
        (folder / name).write_text(f"{written}\n")
        capsys.readouterr()
        assert docs.main(["--check", str(folder)]) == 1
        said = [line for line in capsys.readouterr().out.splitlines() if "is old" in line]
        assert said == [f"{folder / name} is old: run python docs/generate/cli.py"]
        (folder / name).write_text(written)


def test_quickstart_passes_its_options_on(run, monkeypatch, tmp_path):
    calls = []
    fake = types.ModuleType("phatgoose.workflows.quickstart")
    fake.run_quickstart = lambda out, *, smoke, fresh: calls.append((out, smoke, fresh))
    monkeypatch.setitem(sys.modules, "phatgoose.workflows.quickstart", fake)
    assert run("quickstart", "--out", tmp_path / "q", "--smoke").code == 0
    assert run("quickstart", "--fresh").code == 0
    assert calls == [(tmp_path / "q", True, False), (Path("quickstart-out"), False, True)]


def test_ctrl_c(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    fake = types.ModuleType("phatgoose.workflows.quickstart")
    fake.run_quickstart = stop
    monkeypatch.setitem(sys.modules, "phatgoose.workflows.quickstart", fake)
    result = run("quickstart")
    assert result.code == 130
    assert "stopped; run the same command again to go on" in result.err


@pytest.fixture
def bigbench(tmp_path):
    for name in ("tense", "plural"):
        (tmp_path / name).mkdir()
        rows = [{"input": f"Q {name} {i}", "target": f"a{i}"} for i in range(30)]
        (tmp_path / name / "task.json").write_text(json.dumps({"name": name, "examples": rows}))
    return tmp_path


def test_tasks(run, bigbench):
    both = "bigbench:plural\nbigbench:tense\n"
    assert run("tasks", "bigbench", "--folder", bigbench).out == both
    assert run("tasks", "--folder", bigbench).out == both
    assert run("tasks", "bigbench", "--folder", bigbench, "--match", "TEN").out == "bigbench:tense\n"
    none = run("tasks", "bigbench", "--folder", bigbench, "--match", "xyz")
    assert none.code == 1
    assert "'xyz'" in none.err


def test_tasks_show(run, bigbench):
    from phatgoose import load_task

    task = load_task("bigbench:tense", folder=bigbench)
    result = run("tasks", "show", "bigbench:tense", "--folder", bigbench)
    assert result.code == 0, result.err
    assert task.hash in result.out
    assert f"{len(task.train)} rows" in result.out
    assert f"{len(task.test)} rows" in result.out
    for example in task.train[:2]:
        assert example.input in result.out
    assert "example 3" not in result.out
    misspelt = run("tasks", "show", "bigbench:tens", "--folder", bigbench)
    assert misspelt.code == 1
    assert "did you mean 'tense'" in misspelt.err


def test_tables_on_a_terminal_keep_every_cell(monkeypatch):
    from rich.console import Console

    from phatgoose.cli.measure import show

    console = Console(force_terminal=True, width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr(show, "Console", lambda **_: console)
    show.table(("name", "value"), [("[red]one[/]", "1.0 [0.5, 1.0]")], numbers=("value",))
    text = console.export_text()
    console.file.close()
    assert "[red]one[/]" in text
    assert "1.0 [0.5, 1.0]" in text


def test_openmp_waits_briefly_before_torch_is_imported():
    """libgomp reads the setting once, when torch loads it; beside other work its own choice costs ten
    times the time."""
    code = (
        "import os, sys; import phatgoose.cli.main as main; assert 'torch' not in sys.modules\n"
        "main.app = lambda **_: print(os.environ.get('GOMP_SPINCOUNT'))\nmain.main()"
    )

    def said(**settings):
        clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        return subprocess.run(
            [sys.executable, "-c", code], env=clean | settings, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert said() == "10000"
    assert said(GOMP_SPINCOUNT="7") == "7"
    assert said(OMP_WAIT_POLICY="passive") == "None"
