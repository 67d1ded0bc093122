"""The HTML page of results and of a traced pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phatgoose.analysis import page as analysis_page
from phatgoose.analysis.page import RoutedPrompt
from phatgoose.errors import EvaluationError
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.routers import PHATGOOSE, Router
from phatgoose.workflows.experiment.page import FORMAT, page_data
from phatgoose.workflows.traced import TraceRequest, traced, with_cards


def report(
    results: Mapping[str, Any] | None, prompts: Sequence[RoutedPrompt] = (), *, out: Path | str
) -> Path:
    """Writes the page to `out`, whole or not at all, and returns its path.

    Args:
        results: what an experiment or the quickstart writes as results.json, or tables of your own:
            `phatgoose.analysis.checks.SHAPE` says what they must hold. Parts that are left out are left out of the
            page. Tasks and systems may be empty if there are prompts or experts.
        prompts: shown in this order, tokens coloured by expert.

    Raises:
        EvaluationError: `results` or a prompt is malformed; the message says where.
        StorageError: the file can't be written; an existing one is left as it was.
    """
    return analysis_page.report(None if results is None else for_page(results), prompts, out=out)


def for_page(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """`results` as the page takes them: those of an experiment are rearranged, others are left as they are."""
    return page_data(results) if results.get("format") == FORMAT else results


def read_results(path: Path) -> dict[str, Any]:
    """results.json of an experiment or the quickstart, or the data that a page offers for download (then its results).

    Raises:
        EvaluationError: it is none of these.
    """
    found = read_json(path, EvaluationError)
    if isinstance(found, dict) and str(found.get("format", "")).startswith("phatgoose-report/"):
        found = found.get("results")
    found = for_page(found) if isinstance(found, dict) else {}
    if "systems" not in found or "tasks" not in found:
        raise EvaluationError(
            f"{path} holds no results: expected results.json of an experiment, or a page's data."
        )
    return dict(found)


def page(
    out: Path,
    results: Mapping[str, Any] | None = None,
    *,
    base: Base | None = None,
    pool: Pool | None = None,
    router: Router | None = None,
    request: TraceRequest | None = None,
    options: RouteOptions | None = None,
) -> Path:
    """Writes the page. With a pool and its base, the pool is traced: experts get cards, tasks profiles, and prompts
    answers.

    Raises:
        EvaluationError: there is nothing to show, or the results are malformed.
    """
    data: dict[str, Any] = dict(results or {"tasks": [], "systems": []})
    if pool is None or base is None:
        if not data["systems"]:
            raise EvaluationError("there is nothing to show: give results, or a pool.")
        return analysis_page.report(data, out=out)
    request = request or TraceRequest()
    tasks = request.tasks
    seen = traced(base, pool, router or PHATGOOSE(), replace(request, shown=len(tasks)), options)
    known = {task["name"] for task in data["tasks"]}
    data["tasks"] = [
        *data["tasks"],
        *({"name": t.name, "group": "traced", "rows": len(t.test)} for t in tasks if t.name not in known),
    ]
    names = {record["name"] for record in data.get("experts", [])}
    data["experts"] = [
        *with_cards(data.get("experts", []), seen.cards),
        *(card for card in seen.cards if card["name"] not in names),
    ]
    for key, new in (("shares", seen.shares), ("layers", seen.layers)):
        data[key] = {**data.get(key, {}), **new}
    data.setdefault("base", {"spec": base.spec, "notes": list(base.notes)})
    return analysis_page.report(data, seen.prompts, out=out)
