"""`phatgoose`: the app and its entry point."""

from __future__ import annotations

import os
import warnings
from typing import Annotated

import typer

from phatgoose.cli import doctor
from phatgoose.cli.ask import chat, explain, generate, serve, ui
from phatgoose.cli.common.group import Commands
from phatgoose.cli.contribute import convert, gate, import_reference, push, signature, train
from phatgoose.cli.measure import eval, experiment, quickstart, report, routers, tasks
from phatgoose.cli.pools import pool
from phatgoose.serving.threads import limit_openmp_spinning

app = typer.Typer(
    name="phatgoose",
    cls=Commands,
    help="Turn LoRA adapters of one base model into one model that routes every token to the right experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.command)
app.command("train")(train.command)
app.command("gate")(gate.command)
app.command("signature")(signature.command)
app.add_typer(pool.app, name="pool")
app.command("push")(push.command)
app.command("convert")(convert.command)
app.command("import-reference")(import_reference.command)
app.command("eval")(eval.command)
app.command("experiment")(experiment.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("serve")(serve.command)
app.command("explain")(explain.command)
app.command("report")(report.command)
app.command("ui")(ui.command)
app.add_typer(tasks.app, name="tasks")
app.command("routers")(routers.command)
app.command("doctor")(doctor.command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"phatgoose {version('phatgoose')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script. Settings of other libraries are made here, before any of them is imported."""
    limit_openmp_spinning()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("PHATGOOSE_DEBUG"):
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        warnings.simplefilter("ignore")
    app(prog_name="phatgoose")


if __name__ == "__main__":
    main()
