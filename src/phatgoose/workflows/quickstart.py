"""The quickstart: a built-in experiment that prints its tables and what to type next."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phatgoose.errors import PhatgooseError
from phatgoose.models.base.load import load_base
from phatgoose.workflows.experiment.page import claim_text
from phatgoose.workflows.experiment.recipe import ExperimentRecipe
from phatgoose.workflows.experiment.run import run_experiment
from phatgoose.workflows.experiment.systems import MAIN, ORACLE
from phatgoose.workflows.first_answers import POOL, first_answers

RECIPES = Path(__file__).parent / "recipes"
SMALL = "--steps 60 --rows-per-step 16 --learning-rate 1e-3 --validate-every 20"
"""Settings of a training that ends within minutes on a laptop, as the README has them; the defaults are the paper's."""


def quickstart_recipe(*, smoke: bool = False) -> ExperimentRecipe:
    """The built-in recipe. `smoke`: two experts and a few steps; its numbers mean nothing."""
    return ExperimentRecipe.read(RECIPES / ("quickstart-smoke.toml" if smoke else "quickstart.toml"))


def run_quickstart(
    out: str | Path = "quickstart-out",
    *,
    smoke: bool = False,
    fresh: bool = False,
    recipe: ExperimentRecipe | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the quickstart, or the steps that are still missing, and returns what results.json holds.

    Args:
        out: the folder for everything.
        smoke: two experts and a few steps, to see that all parts work.
        fresh: remove what an earlier run made in `out` (only if it is a quickstart's folder).
        recipe: another recipe than the built-in one.

    Raises:
        PhatgooseError: with what to do. Run it again to go on where it stopped.
    """
    out = Path(out)
    if console is None:  # a pipe or a file gets whole lines
        console = Console() if sys.stdout.isatty() else Console(width=1000)
    if recipe is None:
        recipe = quickstart_recipe(smoke=smoke)
        if not out.exists():
            show_first_answers(console, recipe)
    console.print(
        f"[bold]phatgoose quickstart[/]: {len(recipe.pool_entries)} contributors train an expert and its gates on "
        f"{recipe.base}, each on a task of their own; the pool is then measured on those tasks and "
        f"{len(recipe.measure.tasks)} unseen ones. "
        f"Everything goes to [bold]{out}[/]; stop and start again as you like."
    )
    results = run_experiment(recipe, out, console=console, fresh=fresh, kind="quickstart")
    for name, suite in results["suites"].items():
        if suite["common_tasks"]:
            console.print(suite_table(console, name, suite))
    for line in conclusions(results):
        console.print(line, highlight=False)
    if results["failed"]:
        failures = "".join(f"\n  {what}: {why}" for what, why in results["failed"].items())
        raise PhatgooseError(f"some steps failed; the same command runs them again:{failures}")
    _print_next_steps(console, out, recipe)
    return results


def show_first_answers(console: Console, recipe: ExperimentRecipe) -> None:
    """Prints answers of the pool that comes with phatgoose, which need no training."""
    console.print(
        f"[bold]First answers[/], from {POOL}, a pool that comes with phatgoose. Its router finds each prompt's expert "
        "by the experts' weights alone."
    )
    base = load_base(recipe.base, dtype=recipe.dtype)
    for found in first_answers(base):
        console.print(
            f"  {found.prompt} [bold]{escape(found.pool)}[/]\n    expert: {found.expert}; the base alone: "
            f"{escape(found.base) or '(nothing)'}",
            highlight=False,
        )
    console.print()


def suite_table(console: Console, name: str, suite: Mapping[str, Any]) -> Table:
    """Systems down, tasks across; tasks are numbered where their names don't fit."""
    tasks = suite["common_tasks"]
    rows = next(iter(suite["systems"].values()))["tasks"][tasks[0]]["rows"]
    title = f"{name} tasks: accuracy on {rows} test rows each"
    table = _table(title, tasks, suite)
    if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
        legend = ", ".join(f"{i} {task}" for i, task in enumerate(tasks, 1))
        table = _table(f"{title}\n{legend}", [str(i) for i in range(1, len(tasks) + 1)], suite)
    return table


def _table(title: str, heads: Sequence[str], suite: Mapping[str, Any]) -> Table:
    table = Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("system", no_wrap=True)
    for head in (*heads, "mean (95 %)"):
        table.add_column(head, justify="right", no_wrap=True)
    for system, found in suite["systems"].items():
        if "mean" in found:
            cells = [f"{found['tasks'][task]['mean']:.2f}" for task in suite["common_tasks"]]
            mean = f"{found['mean']:.3f} ({found['low']:.2f}–{found['high']:.2f})"
            style = "bold" if system == MAIN else None
            table.add_row(system.removeprefix("single:"), *cells, mean, style=style)
    return table


def conclusions(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say: the oracle's gain, the other systems, the recipe's claims, what gates cost."""
    lines = []
    for name, suite in results["suites"].items():
        if not (share := suite["oracle_gain_share"].get(MAIN)):
            continue
        if share["share"] is None:
            lines.append(
                f"{name}: the oracle gains too little over the base here for a share of its gain to be given."
            )
        else:
            lines.append(
                f"{name}: PHATGOOSE recovers [bold]{share['share']:.0%}[/] of the oracle's gain over the base "
                f"(95 %: {share['low']:.0%} to {share['high']:.0%})."
            )
    lines += [claim_text(suite, claim) for suite, claim in results["claims"].items()]
    for name, suite in results["suites"].items():
        for other, d in suite["against"].get(MAIN, {}).items():
            if other == ORACLE or other.startswith("single:"):
                continue
            # Results hold other − PHATGOOSE; 0.0 − x, since −0.0 would be printed with a minus.
            difference, low, high = (0.0 - d[key] for key in ("difference", "high", "low"))
            verdict = "more than" if low > 0 else "less than" if high < 0 else "not distinguishable from"
            lines.append(
                f"  {name}: PHATGOOSE − {other} = {difference:+.3f} ({low:+.3f} to {high:+.3f}): {verdict} {other}"
            )
    experts = results["experts"]
    share_of_tokens = sum(e["gate_token_share"] for e in experts) / len(experts)
    size = sum(e["gate_parameters"] for e in experts) / sum(e["parameters"] for e in experts)
    return [
        *lines,
        f"A gate was trained on {share_of_tokens:.0%} as many tokens as its expert, and is {size:.1%} of its size.",
    ]


def _print_next_steps(console: Console, out: Path, recipe: ExperimentRecipe) -> None:
    used = " ".join((*recipe.pool.tasks.values(), *recipe.measure.tasks.values()))
    another = next(
        t for t in ("social_support", "tense", "qa_wikidata", "intent_recognition") if t not in used
    )
    console.print(
        f"\nTable and routed prompts: {out / 'quickstart.html'}\nAll numbers: {out / 'results.json'}\n\nNext:",
        highlight=False,
        soft_wrap=True,
    )
    for command in (
        *_activation(),
        f"phatgoose chat --pool {out / 'pool'} --raw",
        f"phatgoose pool list {out / 'pool'}",
        f"phatgoose train --task bigbench:{another} --out my-expert {SMALL}",
    ):
        console.print(f"  {command}", style="bold", highlight=False, soft_wrap=True)


def _activation() -> list[str]:
    """The command that puts `phatgoose` on the path, if it isn't: `make quickstart` has an environment of its own."""
    script = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("phatgoose") is not None or not script.exists():
        return []
    here = Path.cwd()
    return [f". {script.relative_to(here) if script.is_relative_to(here) else script}"]
