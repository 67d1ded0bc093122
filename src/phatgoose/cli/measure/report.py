"""`phatgoose report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.common.options import (
    ROUTER_HELP,
    TASK_HELP,
    BackendOption,
    DeviceOption,
    DtypeOption,
    PoolBaseOption,
)
from phatgoose.cli.measure import show


def command(
    results: Annotated[
        Path | None,
        typer.Argument(
            help="results.json of a quickstart or an experiment, or the data downloaded from a page; may be left out."
        ),
    ] = None,
    pool: Annotated[
        Path | None, typer.Option("--pool", help="A pool's folder: its experts get cards, and it is traced.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help=f"{TASK_HELP} Traced on its first test rows; may be given several times."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="A prompt to answer and trace; may be given several times."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("report.html"),
    base: PoolBaseOption = None,
    router: Annotated[str | None, typer.Option("--router", help=ROUTER_HELP)] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")
    ] = 24,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Write a page that shows a comparison, and which experts act where: one HTML file that needs no network."""
    if results is None and pool is None:
        raise typer.BadParameter("give results, or a pool, or both.", param_hint="RESULTS or --pool")
    if pool is None and (task or prompt):
        raise typer.BadParameter(
            "tasks and prompts are traced with a pool: give --pool.", param_hint="--pool"
        )
    from phatgoose.errors import RoutingError
    from phatgoose.workflows.page import page, read_results

    measured = None if results is None else read_results(results)
    if pool is None:
        show.say(str(page(out, results=measured)))
        return
    from phatgoose.cli.common.loading import choose, load_for, load_pool
    from phatgoose.models.attach.options import RouteOptions
    from phatgoose.tasks import load_task

    experts = load_pool(pool)
    choice = choose(router, experts, RouteOptions(backend))
    if choice.router is None or choice.merge:
        raise RoutingError(f"router {choice.text!r} routes to no experts that could be traced.")
    tasks = [load_task(spec) for spec in task or ()]
    model = load_for(experts, base, dtype, device)
    written = page(
        out, results=measured, base=model, pool=experts, router=choice.router, tasks=tasks, texts=prompt or (),
        new_tokens=max_new_tokens, options=choice.options,
    )  # fmt: skip
    show.say(str(written))
