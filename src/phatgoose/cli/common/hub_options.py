"""Options of the commands that use the Hub.

There is none for an access token, since other users can see command lines.
"""

from __future__ import annotations

from typing import Annotated

import typer

MAX_GB = 4.0

RepoArgument = Annotated[
    str, typer.Argument(help="A repository on the Hub, org/name; made if it isn't there.")
]
PrivateOption = Annotated[
    bool,
    typer.Option("--private", help="Make a new repository private, and refuse one that is there and public."),
]
BranchOption = Annotated[
    str | None, typer.Option("--branch", help="The branch, made if it isn't there; main if not given.")
]
MessageOption = Annotated[str | None, typer.Option("--message", help="The commit's message.")]
PathsOption = Annotated[
    bool, typer.Option("--allow-paths", help="Publish records that hold paths of local folders, too.")
]
MaxOption = Annotated[
    float, typer.Option("--max-gb", min=0.0, help="From the Hub, refuse files that are larger, in GiB.")
]


def in_bytes(gb: float) -> int:
    """Gibibytes in bytes."""
    return int(gb * 2**30)
