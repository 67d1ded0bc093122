"""`phatgoose report`: one HTML page of results, and of what a pool does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import phatgoose
from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import (
    AT_LEAST_1,
    POOL_HELP,
    TASK_HELP,
    BackendOption,
    BaseOptions,
    RouterOption,
)
from phatgoose.cli.measure import show
from phatgoose.errors import RoutingError


@dataclass(frozen=True)
class TraceOptions(Options):
    """What of a pool is traced."""

    pool: Annotated[
        Path | None, typer.Option(help=f"{POOL_HELP} Its experts get cards, and it is traced.")
    ] = None
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{TASK_HELP} Traced on its first test rows; may be given several times."),
    ] = None
    prompt: list[str] | None = None
    """A prompt to answer and trace; may be given several times."""
    router: RouterOption = None
    max_new_tokens: Annotated[int, AT_LEAST_1] = 24
    """Most tokens of an answer."""
    backend: BackendOption = "auto"


@expand_options
def command(
    traced: TraceOptions,
    base: BaseOptions,
    results: Annotated[
        Path | None,
        typer.Argument(
            help="results.json of an experiment or the quickstart, or data downloaded from a page; may be left out."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Write a page that shows a comparison, and which experts act where: one HTML file that needs no network."""
    if results is None and traced.pool is None:
        raise typer.BadParameter("give results, or a pool, or both.", param_hint="RESULTS or --pool")
    if traced.pool is None and (traced.task or traced.prompt):
        raise typer.BadParameter(
            "tasks and prompts are traced with a pool: give --pool.", param_hint="--pool"
        )
    from phatgoose.workflows.page import TraceRequest, page, read_results

    measured = None if results is None else read_results(results)
    if traced.pool is None:
        show.say(str(page(out, results=measured)))
        return
    from phatgoose.cli.common.loading import load_with_choices
    from phatgoose.models.attach.options import RouteOptions

    tasks = [phatgoose.load_task(spec) for spec in traced.task or ()]
    options = RouteOptions(traced.backend)
    model, experts, (choice,) = load_with_choices(traced.pool, [traced.router], base, options)
    if choice.router is None or choice.merge:
        raise RoutingError(f"router {choice.text!r} routes to no experts that could be traced.")
    request = TraceRequest(tasks, texts=traced.prompt or (), new_tokens=traced.max_new_tokens)
    written = page(
        out, measured, base=model, pool=experts, router=choice.router, request=request, options=choice.options
    )
    show.say(str(written))
