"""`phatgoose routers`: which routers there are, what each needs of a pool, and its settings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.common.expand import field_docs
from phatgoose.cli.measure import show
from phatgoose.errors import PluginError
from phatgoose.routers.parse import REQUIRED, ROUTERS, router_class, settings_of

if TYPE_CHECKING:
    from phatgoose.routers import Router


def command(
    name: Annotated[
        str | None, typer.Argument(help="The router; if not given, all are listed.", show_default=False)
    ] = None,
) -> None:
    """List the routers, ours and those of installed packages, or describe one with its settings."""
    if name is not None:
        _describe(name.lower(), router_class(name))
        return
    rows = []
    for known in ROUTERS:
        package = ROUTERS.package(known)
        try:
            kind = router_class(known)
        except PluginError as error:
            rows.append((known, package, str(error), ""))
        else:
            rows.append((written(known, kind), package, kind.needs, chooses(kind)))
    show.table(["router", "package", "needs", "chooses"], rows)


def written(name: str, kind: type[Router]) -> str:
    """A router with its settings as the command line has them: `lag:first=20,top_k=1`."""
    if hasattr(kind, "from_text"):  # it reads what follows the colon by itself
        return f"{name}:{next(iter(settings_of(kind))).upper()}"
    settings = [
        f"{key}={key.upper() if default is REQUIRED else _value(default)}"
        for key, (_, default) in settings_of(kind).items()
    ]
    return f"{name}:{','.join(settings)}" if settings else name


def chooses(kind: type[Router]) -> str:
    """How many experts act, and whether the router is a control."""
    return f"{kind.chooses} (a control)" if kind.control else kind.chooses


def _value(default: object) -> str:
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _describe(name: str, kind: type[Router]) -> None:
    show.say(written(name, kind))
    show.say(f"\n{inspect.getdoc(kind) or ''}")
    show.say(f"\nneeds: {kind.needs or 'nothing'}\nchooses: {chooses(kind) or 'not said'}")
    settings = settings_of(kind)
    if docs := {key: text for key, text in field_docs(kind).items() if key in settings}:
        show.say("\nsettings:")
        for key, text in docs.items():
            show.say(f"  {key}: {text}")
