"""`phatgoose ui`: a page that shows an answer's experts as it is written."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import BackendOption, BaseOptions, PoolFolderOption
from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError
from phatgoose.extras import install


@expand_options
def command(
    pool: PoolFolderOption,
    base: BaseOptions,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the page is; 0 takes any port that is free.")
    ] = 8746,
    backend: BackendOption = "auto",
) -> None:
    """Show in a browser which experts act on each token as an answer is written; switch routers, top-k and experts.

    Only this machine can open the page. Ctrl-C ends it.
    """
    from phatgoose.cli.common.loading import load_for, load_pool, record_first_use, show_choice
    from phatgoose.models.attach.options import RouteOptions

    try:
        from phatgoose.ui.app import listen, make_app, server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise PhatgooseError(f"phatgoose ui needs FastAPI and uvicorn: {install('serve')}") from error
    from phatgoose.ui.session import Session

    with listen(port) as socket:  # fails before anything is loaded if the port is taken
        experts = load_pool(pool)
        assert experts is not None
        model = load_for(experts, base, pool)
        if base.base is None:
            record_first_use(pool, experts, model)
        session = Session(model, experts, RouteOptions(backend))
        show_choice(model, base, session.fit.text, session.fit.why)
        app = make_app(session)
        show.say(f"http://127.0.0.1:{socket.getsockname()[1]}/")
        show.note("Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down, and raises it again
            server(app).run(sockets=[socket])
        show.note("ended")  # also if uvicorn was stopped by Ctrl-C and didn't raise it again
