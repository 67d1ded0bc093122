"""`phatgoose quickstart`: the built-in experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option("--out", help="The folder for everything it makes.")] = Path(
        "quickstart-out"
    ),
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Two experts and a few steps: shows that all parts work; the numbers mean nothing.",
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of continuing with what is in the folder.")
    ] = False,
) -> None:
    """Train experts on real tasks, build a pool, and compare it with the base, the experts and simple mixtures.

    Fetches the default base and BIG-bench on first use. If it is stopped, the next start continues
    where it was.
    """
    from phatgoose.workflows.quickstart import run_quickstart

    run_quickstart(out, smoke=smoke, fresh=fresh)
