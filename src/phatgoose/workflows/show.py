"""What the quickstart says on the screen."""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from phatgoose.experts.pool import Pool
from phatgoose.models.base.base import Base
from phatgoose.records import Task, TaskScore
from phatgoose.workflows.recipe import RECOVERED_FLOOR, Recipe

SMALL = "--steps 60 --rows-per-step 16 --learning-rate 1e-3 --validate-every 20"
"""Settings of a training that ends within minutes on a laptop, as the README has them; the defaults are the paper's."""

NOTES = [
    "Scores are accuracies on the first rows of each task's test split (exact match of a greedy answer, or the best-ranked "
    "choice); intervals are bootstrap 95 % over rows.",
    "The oracle is told each row's task and takes the single expert that is best on that task's validation rows; no router has that.",
    "uniform and merged are the same function for low-rank updates, computed in two ways.",
    "Tasks, rows, prompts and settings were fixed before the test rows were looked at.",
]


def screen() -> Console:
    """Where the quickstart writes: a terminal at its width, a pipe or file without breaking lines."""
    return Console() if sys.stdout.isatty() else Console(width=1000)


def plan(console: Console, recipe: Recipe, out: Path) -> None:
    console.print(
        f"[bold]phatgoose quickstart[/]: {len(recipe.pool_tasks)} contributors train an expert and its gates on {recipe.base}, "
        f"each on a task of their own; the pool is then measured on those tasks and {len(recipe.held_out_tasks)} unseen ones. "
        f"Everything goes to [bold]{out}[/]; stop and start again as you like."
    )


def base(console: Console, base: Base, tasks: Mapping[str, Sequence[Task]]) -> None:
    for note in base.notes:
        console.print(f"  base: {note}", highlight=False)
    for group, members in tasks.items():
        console.print(f"  {group} tasks: " + ", ".join(short(t.name) for t in members), highlight=False)


@contextlib.contextmanager
def progress(console: Console, text: str, total: int) -> Iterator[Step]:
    """A bar over `total` parts; nothing but a line at the end where the output isn't a terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield Step(bars, bars.add_task(text, total=total), text)


class Step:
    """One bar."""

    def __init__(self, bars: Progress, task: Any, text: str):
        self.bars, self.task, self.text, self.done = bars, task, text, 0

    def advance(self) -> None:
        self.done += 1
        self.bars.update(self.task, completed=self.done)

    def inner(self, name: str, rows: int, total: int) -> None:
        """How far the part that runs now is."""
        self.bars.update(
            self.task, completed=self.done + rows / max(total, 1), description=f"{self.text}: {short(name)}"
        )


def short(task: str) -> str:
    """A task's name without its source and the suffix of BIG-bench's JSON subtasks."""
    return task.split(":", 1)[-1].rsplit("/", 1)[-1].removesuffix("_json")


def system(
    console: Console, name: str, row: Mapping[str, TaskScore], groups: Mapping[str, Sequence[str]]
) -> None:
    means = [f"{group} {sum(row[t].mean for t in ts) / len(ts):.3f}" for group, ts in groups.items() if ts]
    console.print(f"  [bold]{name}[/]: " + ", ".join(means), highlight=False)


def expert(console: Console, record: Mapping[str, Any]) -> None:
    console.print(
        f"  expert [bold]{record['name']}[/]: {record['base']:.2f} → {record['own']:.2f} on its own task's test rows; expert "
        f"{record['expert_seconds']:.0f} s, gates {record['gate_seconds']:.0f} s",
        highlight=False,
    )


def table(console: Console, results: Mapping[str, Any]) -> None:
    """Systems down, tasks across, one table a group; tasks are numbered where their names don't fit."""
    for group in ("in-pool", "held-out"):
        tasks = [t for t in results["tasks"] if t["group"] == group]
        if not tasks:
            continue
        title = f"{group} tasks: accuracy on {tasks[0]['rows']} test rows each"
        names = [short(t["name"]) for t in tasks]
        grid = _grid(title, names, tasks, results["systems"], group)
        if console.measure(grid, options=console.options.update(width=1000)).maximum > console.width:
            legend = ", ".join(f"{i} {name}" for i, name in enumerate(names, 1))
            numbers = [str(i) for i in range(1, len(names) + 1)]
            grid = _grid(f"{title}\n{legend}", numbers, tasks, results["systems"], group)
        console.print(grid)


def _grid(
    title: str, heads: Sequence[str], tasks: Sequence[Any], systems: Sequence[Any], group: str
) -> Table:
    grid = Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    grid.add_column("system", no_wrap=True)
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("mean (95 %)", justify="right", no_wrap=True)
    for row in systems:
        mean = row["groups"][group]
        cells = [f"{row['scores'][t['name']]['mean']:.2f}" for t in tasks]
        grid.add_row(
            row["name"].removeprefix("single: "), *cells, f"{mean['mean']:.3f} ({mean['low']:.2f}–{mean['high']:.2f})",
            style="bold" if row["name"] == "PHATGOOSE" else None,
        )  # fmt: skip
    return grid


def verdict(console: Console, results: Mapping[str, Any]) -> None:
    """The claims, and whether this run bears them out."""
    for group, found in results["recovered"].items():
        if found["share"] is None:
            console.print(
                f"{group}: the oracle gains too little over the base here for a share of its gain to be given."
            )
            continue
        interval = f" (95 %: {found['low']:.0%} to {found['high']:.0%})"
        floor = f"; the floor is {RECOVERED_FLOOR:.0%}" if group == "in-pool" else ""
        console.print(
            f"{group}: PHATGOOSE recovers [bold]{found['share']:.0%}[/] of the oracle's gain over the base{interval}{floor}."
        )
    for one in results["comparisons"]:
        if one["b"] != "oracle":
            more = (
                "more than"
                if one["low"] > 0
                else "less than"
                if one["high"] < 0
                else "not distinguishable from"
            )
            console.print(
                f"  {one['group']}: PHATGOOSE − {one['b']} = {one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f}): {more} {one['b']}",
                highlight=False,
            )
    experts = results["experts"]
    share = sum(e["gate_token_share"] for e in experts) / len(experts)
    size = sum(e["gate_parameters"] for e in experts) / sum(e["parameters"] for e in experts)
    console.print(
        f"A gate was trained on {share:.0%} as many tokens as its expert, and is {size:.1%} of its size.",
        highlight=False,
    )


def next_steps(console: Console, out: Path, recipe: Recipe, page: Path, pool: Pool) -> None:
    console.print(
        f"\nTable and routed prompts: {page}\nAll numbers: {out / 'results.json'}\n\nNext:",
        highlight=False,
        soft_wrap=True,
    )
    for command in (
        *activation(),
        f"phatgoose chat --pool {out / 'pool'} --raw",
        f"phatgoose pool list {out / 'pool'}",
        f"phatgoose train --task bigbench:{_another(recipe)} --out my-expert {SMALL}",
    ):
        console.print(f"  {command}", style="bold", highlight=False, soft_wrap=True)


def activation() -> list[str]:
    """The command that puts `phatgoose` on the path, where it isn't: `make quickstart` runs it out of an environment of its own."""
    script = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("phatgoose") is not None or not script.exists():
        return []
    here = Path.cwd()
    return [f". {script.relative_to(here) if script.is_relative_to(here) else script}"]


def _another(recipe: Recipe) -> str:
    used = " ".join((*recipe.pool_tasks, *recipe.held_out_tasks))
    return next(t for t in ("social_support", "tense", "qa_wikidata", "intent_recognition") if t not in used)


def made(seconds: float) -> dict[str, Any]:
    """When, with what and on what; `seconds` is this run's own time, without what an earlier one had finished."""
    packages = {name: version(name) for name in ("phatgoose", "torch", "transformers", "peft")}
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **packages,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {_cpu()}, {_cores()} cores",
        "seconds": round(seconds, 1),
    }


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"
