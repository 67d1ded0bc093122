"""`phatgoose serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.common.options import (
    ROUTER_NAMES,
    BackendOption,
    DeviceOption,
    DtypeOption,
    PoolBaseOption,
    PoolOption,
    with_settings,
)
from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError
from phatgoose.extras import install
from phatgoose.serving.settings import ServeSettings


@with_settings(ServeSettings)
def command(
    config: ServeSettings,
    base: PoolBaseOption = None,
    pool: PoolOption = None,
    router: Annotated[
        str | None,
        typer.Option(
            "--router",
            help=f"{ROUTER_NAMES} If not given: phatgoose, or where experts lack gates a router that needs none.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="The routed pool's name among the models.")
    ] = "phatgoose",
    host: Annotated[
        str, typer.Option("--host", help="Where to listen. Any place but this machine needs --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            help="A file with a key a line, one of which a request must bring. Or set PHATGOOSE_API_KEY.",
        ),
    ] = None,
    admin_key: Annotated[
        Path | None,
        typer.Option(
            "--admin-key",
            help="A file with the key that changes experts while the server runs. Or set PHATGOOSE_ADMIN_KEY.",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Answer over HTTP as OpenAI's interface does: a pool, its base, single experts and other routers, as models of one server."""
    from phatgoose.serving.threads import run_in_thread

    try:
        from phatgoose.serving.http.server import check_host, read_keys, serve
        from phatgoose.serving.service import Service
    except ModuleNotFoundError as cause:
        raise PhatgooseError(f"the server needs {cause.name}: {install('serve')}") from None
    from phatgoose.cli.common.loading import load_for, load_pool, own_router
    from phatgoose.experts.manifest import read_manifest
    from phatgoose.models.attach.options import RouteOptions
    from phatgoose.workflows.prompt_forms import endpoint

    keys = read_keys(api_keys, admin_key)
    check_host(host, keys)

    def made() -> Service:
        # Without experts, since the last was taken out while it ran, the base answers until there are some.
        empty = pool is not None and not read_manifest(pool)["experts"]
        experts = None if empty else load_pool(pool)
        routed_by = router or own_router(experts)
        model = load_for(experts, base, dtype, device, folder=pool)
        if experts and (path := endpoint(experts)):
            show.note(f"note: use {path}: the experts were trained on prompts in that form.")
        return Service(
            model,
            config,
            pool=experts,
            folder=pool,
            router=routed_by,
            name=name,
            options=RouteOptions(backend),
        )

    serve(run_in_thread(made), host, port, keys, ready=show.say)
