"""`phatgoose pool pack` and `pool unpack`: one file for all experts, or a folder for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.measure import show

if TYPE_CHECKING:
    from phatgoose.models.attach.attach import Routing

_SAID: set[str] = set()
PoolArgument = Annotated[Path, typer.Argument(help="The pool's folder.")]


def pack(
    pool: PoolArgument,
    spare: Annotated[
        float,
        typer.Option(
            "--spare",
            help="Room for further experts, as a share of those there; it takes no space on disk before it is used.",
        ),
    ] = 0.5,
) -> None:
    """Put the experts' tensors into one file that is mapped into memory, so that a large pool opens at once.

    Everything else works as before: experts are added and removed without rewriting the rest. Packing a packed pool
    again drops what was removed from it.
    """
    from phatgoose.experts.manifest import read_manifest
    from phatgoose.experts.packed.pack import pack

    beside = pack(pool, spare)
    manifest = read_manifest(pool)
    place = pool / manifest["packed"]["file"]
    size = place.stat()
    show.say(
        f"{pool}: {len(manifest['experts']) - len(beside)} experts in {place.name}, {_mib(size.st_blocks * 512)} on "
        f"disk and {_mib(size.st_size)} with room for more"
    )
    for name, reason in beside.items():
        show.warn(f"{name} {reason}; it stays in its folder.")


def unpack(pool: PoolArgument) -> None:
    """Turn a packed pool back into one folder per expert, with every file as it was before packing."""
    from phatgoose.experts.manifest import read_manifest
    from phatgoose.experts.packed.pack import unpack

    unpack(pool)
    show.say(f"{pool}: {len(read_manifest(pool)['experts'])} experts, each in its folder")


def show_copied(routing: Routing | None) -> None:
    """Notes which experts name modules otherwise than this model, and which rows of a packed pool had to be copied."""
    from phatgoose.experts.packed.expert import PackedExpert

    if routing is None:
        return
    for name, paths in routing.renamed.items():
        own, here = next(iter(paths.items()))
        _once(f"note: {name} names its modules in another layout: {own} is taken for {here}")
    if not any(isinstance(e, PackedExpert) for e in routing.pool.experts):
        return
    if copied := routing.copied:
        first = next(iter(copied))
        _once(
            f"note: at {len(copied)} of {len(routing.sites)} modules the packed rows are copied into memory "
            f"({first}: {copied[first]})"
        )


def _once(text: str) -> None:
    if text not in _SAID:
        show.note(text)
        _SAID.add(text)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
