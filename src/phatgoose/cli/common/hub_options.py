"""Options of the commands that use the Hub.

There is none for an access token, since other users can see command lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

MAX_GB = 4.0

RepoArgument = Annotated[
    str, typer.Argument(help="A repository on the Hub, org/name; made if it isn't there.")
]
MaxOption = Annotated[
    float, typer.Option("--max-gb", min=0.0, help="From the Hub, refuse files that are larger, in GiB.")
]


@dataclass(frozen=True)
class PublishOptions:
    """How something is published."""

    private: Annotated[
        bool,
        typer.Option("--private", help="Make a new repository private, and refuse an existing public one."),
    ] = False
    branch: Annotated[
        str | None, typer.Option(help="The branch, made if it isn't there; main if not given.")
    ] = None
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None
    allow_paths: Annotated[
        bool, typer.Option("--allow-paths", help="Publish records that hold paths of local folders, too.")
    ] = False


def in_bytes(gb: float) -> int:
    """Gibibytes in bytes."""
    return int(gb * 2**30)
