"""`phatgoose quickstart`: the built-in experiment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phatgoose.cli.common.expand import Options, expand_options


@dataclass(frozen=True)
class QuickstartOptions(Options):
    """What is made, and where."""

    out: Path = Path("quickstart-out")
    """The folder for everything it makes."""
    smoke: bool = False
    """Two experts and a few steps: shows that all parts work; the numbers mean nothing."""
    fresh: bool = False
    """Start over instead of continuing with what is in the folder."""


@expand_options
def command(run: QuickstartOptions) -> None:
    """Train experts on real tasks, build a pool, and compare it with the base, the experts and simple mixtures.

    Fetches the default base and BIG-bench on first use. If it is stopped, the next start continues
    where it was.
    """
    from phatgoose.workflows.quickstart import run_quickstart

    run_quickstart(run.out, smoke=run.smoke, fresh=run.fresh)
