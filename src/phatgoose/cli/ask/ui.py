"""`phatgoose ui`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.common.options import BackendOption, DeviceOption, DtypeOption, PoolBaseOption
from phatgoose.cli.measure import show


def command(
    pool: Annotated[Path, typer.Option("--pool", help="The pool's folder.")],
    base: PoolBaseOption = None,
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Where the page is; 0 takes any port that is free."),
    ] = 8746,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Show in a browser, while an answer is written, which experts act on each token; switch routers, top-k and experts.

    Only this machine can open the page. Ctrl-C ends it.
    """
    from phatgoose.cli.common.loading import load_for, load_pool
    from phatgoose.errors import PhatgooseError
    from phatgoose.extras import install
    from phatgoose.models.attach.options import RouteOptions

    try:
        from phatgoose.ui.app import listen, make_app, server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise PhatgooseError(f"phatgoose ui needs FastAPI and uvicorn: {install('serve')}") from error
    from phatgoose.ui.session import Session

    with listen(port) as socket:  # a taken port is told before anything is loaded
        experts = load_pool(pool)
        assert experts is not None
        app = make_app(Session(load_for(experts, base, dtype, device), experts, RouteOptions(backend)))
        show.say(f"http://127.0.0.1:{socket.getsockname()[1]}/")
        show.note("Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order, and says how it came
            server(app).run(sockets=[socket])
        show.note("ended")  # also where the shell that started this ignores Ctrl-C, and uvicorn doesn't
