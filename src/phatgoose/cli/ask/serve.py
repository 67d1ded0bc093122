"""`phatgoose serve`: a pool behind OpenAI's HTTP interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import OWN_ROUTER, ROUTER_NAMES, BackendOption, BaseOptions, PoolOption
from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError
from phatgoose.extras import install
from phatgoose.serving.settings import ServeSettings
from phatgoose.shipped import own_folder


@dataclass(frozen=True)
class AddressOptions(Options):
    """Where the server listens, and who may come in."""

    host: str = "127.0.0.1"
    """Where to listen. Any place but this machine needs --api-keys."""
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000
    """The port; 0 takes a free one."""
    api_keys: Path | None = None
    """A file with one key per line. A request must bring one of them. Or set PHATGOOSE_API_KEY."""
    admin_key: Path | None = None
    """A file with the key that changes experts while the server runs. Or set PHATGOOSE_ADMIN_KEY."""


@expand_options
def command(
    base: BaseOptions,
    address: AddressOptions,
    config: ServeSettings,
    pool: PoolOption = None,
    router: Annotated[
        str | None,
        typer.Option(help=f"{ROUTER_NAMES} If not given: {OWN_ROUTER}."),
    ] = None,
    name: Annotated[str, typer.Option(help="The routed pool's name among the models.")] = "phatgoose",
    backend: BackendOption = "auto",
) -> None:
    """Answer over HTTP by OpenAI's API: a pool, its base, single experts and other routers are models of one server."""
    from phatgoose.serving.threads import run_in_thread

    try:
        from phatgoose.serving.http.server import check_host, read_keys, serve
        from phatgoose.serving.service import Service
    except ModuleNotFoundError as cause:
        raise PhatgooseError(f"the server needs {cause.name}: {install('serve')}") from None
    from phatgoose.cli.common.loading import load_for, load_with_choices
    from phatgoose.experts.manifest import read_manifest
    from phatgoose.models.attach.options import RouteOptions
    from phatgoose.routers.fitting import WITHOUT_POOL
    from phatgoose.workflows.prompt_forms import endpoint

    keys = read_keys(address.api_keys, address.admin_key)
    folder = own_folder(pool)
    if folder != pool and keys.admin:
        show.note(f"note: changes of the experts last as long as the server: {pool} comes with phatgoose.")
    check_host(address.host, keys)

    def made() -> Service:
        # A pool may be empty, if its last expert was removed while a server ran: then the base answers meanwhile.
        empty = folder is not None and not read_manifest(folder)["experts"]
        options = RouteOptions(backend)
        if pool is None or empty:
            experts, routed_by = None, router or WITHOUT_POOL
            model = load_for(None, base, folder=folder)
        else:
            model, experts, (choice,) = load_with_choices(pool, [router], base, options, shared=True)
            routed_by = choice.text
        if experts and (path := endpoint(experts)):
            show.note(f"note: use {path}: the experts were trained on prompts in that form.")
        return Service(
            model, config, pool=experts, folder=folder, router=routed_by, name=name, options=options
        )

    serve(run_in_thread(made), address.host, address.port, keys, ready=show.say)
