"""`phatgoose`: all commands, and the entry point."""

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
COMMANDS = {
    "quickstart": quickstart,
    "train": train,
    "gate": gate,
    "signature": signature,
    "push": push,
    "convert": convert,
    "import-reference": import_reference,
    "eval": eval,
    "experiment": experiment,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "explain": explain,
    "report": report,
    "ui": ui,
    "routers": routers,
    "doctor": doctor,
}
for name, module in COMMANDS.items():
    app.command(name)(module.command)
app.add_typer(pool.app, name="pool")
app.add_typer(tasks.app, name="tasks")


def _version(wanted: bool) -> None:
    if wanted:
        from phatgoose import __version__

        typer.echo(f"phatgoose {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script. It sets what other libraries read when they are imported, so before any is."""
    limit_openmp_spinning()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("PHATGOOSE_DEBUG"):
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        warnings.simplefilter("ignore")
    app(prog_name="phatgoose")


if __name__ == "__main__":
    main()
