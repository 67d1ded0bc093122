"""`phatgoose push`: publish an expert on the Hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.common.hub_options import (
    BranchOption,
    MessageOption,
    PathsOption,
    PrivateOption,
    RepoArgument,
)
from phatgoose.cli.measure import show


def command(
    expert: Annotated[Path, typer.Argument(help="The expert's folder; a plain PEFT folder will do.")],
    repo: RepoArgument,
    private: PrivateOption = False,
    branch: BranchOption = None,
    message: MessageOption = None,
    allow_paths: PathsOption = False,
) -> None:
    """Publish one expert on the Hub, in one commit, so that others can add it to their pools. Log in with `hf auth
    login`."""
    from phatgoose.experts.expert import Expert

    loaded = Expert.load(expert)
    done = loaded.push(
        repo, private=private or None, revision=branch, message=message, allow_paths=allow_paths
    )
    show.say(f"{done}: {loaded.name}, gates: {'no' if loaded.gates is None else 'yes'}")
    show.facts([("next", shlex.join(["phatgoose", "pool", "add", "POOL", str(done)]))])
