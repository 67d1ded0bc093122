"""`phatgoose`: all commands, the entry point, and how every command ends."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from phatgoose.cli import doctor, pool
from phatgoose.cli.ask import chat, explain, generate, serve, ui
from phatgoose.cli.contribute import convert, gate, import_reference, push, signature, train
from phatgoose.cli.measure import eval, experiment, quickstart, report, routers, show, tasks
from phatgoose.errors import PhatgooseError
from phatgoose.serving.threads import limit_openmp_spinning

RESUMABLE = frozenset({"train", "gate", "signature", "quickstart", "experiment"})
"""Commands that go on where they were stopped."""


class Commands(TyperGroup):
    """The group of all commands: a refusal is one line and exit code 1, Ctrl-C exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PhatgooseError, OSError) as error:
            # An OSError with a file name is a refusal too (a name too long, a failing disk). Others are bugs.
            said = str(error)
            if isinstance(error, OSError):
                said = f"{error.filename}: {error.strerror}." if error.filename is not None else ""
            if not said or os.environ.get("PHATGOOSE_DEBUG"):
                raise
            show.fail(said)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            resumable = ctx.invoked_subcommand in RESUMABLE
            show.note("\nstopped; run the same command again to go on" if resumable else "\nstopped")
            raise typer.Exit(130) from error


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
