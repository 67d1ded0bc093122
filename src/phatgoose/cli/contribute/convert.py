"""`phatgoose convert`: a plain LoRA of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import BASE_HELP, DtypeOption, ExpertNameOption
from phatgoose.cli.measure import show
from phatgoose.errors import ExpertError


@dataclass(frozen=True)
class StartOptions(Options):
    """How the adapter and the base were when training began."""

    initial: Path | None = None
    """The adapter as it was before training. Without it, its initialisation is run again on the base."""
    residual: bool = False
    """The base is the changed one that the adapter was trained on (LoftQ's, PiSSA's residual)."""

    def check(self) -> None:
        if self.initial is not None and self.residual:
            raise typer.BadParameter(
                "it is for an original base, and --residual says that this isn't one.", param_hint="--initial"
            )


@expand_options
def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, as PEFT saved it after training.")],
    base: Annotated[str, typer.Option(help=f"{BASE_HELP} The one that the result is for.")],
    out: Annotated[Path, typer.Option(help="The expert's folder, which plain PEFT can load too.")],
    start: StartOptions,
    name: ExpertNameOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Make a plain LoRA of an adapter whose training began by changing the base: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ.

    PEFT's own conversion: ΔW = s (BA − B₀A₀), of twice the rank, with A₀ and B₀ as they were before training.
    PiSSA's and OLoRA's are computed from the base again; CorDA's, LoRA-GA's and fast PiSSA's (pissa_niter) need
    --initial, LoftQ needs its own base (--residual).
    """
    from phatgoose.cli.common import folders
    from phatgoose.experts.names import slug
    from phatgoose.models.base.convert import LARGE_CHANGE, convert_to_lora
    from phatgoose.models.base.load import load_weights

    start.check()
    folders.check_target(out)
    if out.exists() and any(out.iterdir()):
        raise ExpertError(f"{out} holds an expert already: choose another folder with --out, or remove it.")
    weights, name = load_weights(base, dtype), name or slug(out.name)
    expert, far = convert_to_lora(
        adapter, weights, base, initial=start.initial, residual=start.residual, name=name
    )
    expert.save(out)
    if far is not None and far > LARGE_CHANGE:
        show.warn(
            f"training moved a module's product of A and B by {far:.3g} times its norm: is {base} the base that it was "
            "trained on?"
        )
    rank = max(u.rank for u in expert.updates.values())
    rows = [
        ("expert", f"{expert.name}: LoRA of rank {rank}, {len(expert.updates)} modules"),
        ("saved", str(out)),
    ]
    show.facts([*rows, ("next", shlex.join(["phatgoose", "pool", "create", "POOL", str(out)]))])
