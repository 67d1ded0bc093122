"""How every command ends: a refusal is one line and exit code 1, Ctrl-C exit code 130."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError

RESUMABLE = frozenset({"train", "gate", "signature", "quickstart", "experiment"})
"""Commands that go on where they were stopped."""


class Commands(TyperGroup):
    """The group of all commands."""

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
