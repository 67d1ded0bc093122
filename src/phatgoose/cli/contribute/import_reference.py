"""`phatgoose import-reference`: a pool of the authors' checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.common.options import BASE_HELP
from phatgoose.cli.measure import show
from phatgoose.errors import PoolError


def command(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' torch file: all experts of one pool.")],
    base: Annotated[str, typer.Option("--base", help=f"{BASE_HELP} Its configuration is enough.")],
    out: Annotated[Path, typer.Option("--out", help="The pool's folder, which must not be there yet.")],
    names: Annotated[
        Path | None,
        typer.Option("--names", help="A text file with the experts' names in their order, one per line."),
    ] = None,
) -> None:
    """Make a pool of a checkpoint that the paper's authors published: PEFT folders with gates.

    The file is mapped into memory and read one expert at a time. Unexpected content is refused by name, and nothing
    is written then. If the base's weights are on this machine, its fingerprint is recorded, and other bases refuse
    the pool.
    """
    from phatgoose.experts.reference_checkpoint import import_reference
    from phatgoose.models.base.without_weights import base_shape

    called = None
    if names is not None:
        try:
            called = names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as cause:
            raise PoolError(f"{names} can't be read: {cause}") from cause
    shape = base_shape(base)
    if shape.fingerprint is None:
        show.note(
            "note: the base's weights aren't on this machine, so the pool records no fingerprint of it."
        )
    contents = import_reference(checkpoint, shape, out, called, progress=_progress)
    show.say(f"{out}: {contents.experts} experts at {len(contents.modules)} modules")
    for name, how in contents.copies.items():
        if how == "not compared":
            show.warn(
                f"{name} in the checkpoint was left out, and could not be compared with the base's own."
            )
    show.facts(
        [
            ("next", shlex.join(["phatgoose", "pool", "pack", str(out)])),
            ("", shlex.join(["phatgoose", "generate", "--pool", str(out), "--base", base]) + ' "PROMPT"'),
        ]
    )


def _progress(done: int, of: int) -> None:
    if done == of or done % 10 == 0:
        show.note(f"{done} of {of} experts")
