"""The page of a pool: what was measured, if anything, and what tracing it on tasks and prompts shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phatgoose.analysis.page import report
from phatgoose.errors import EvaluationError
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json
from phatgoose.models.base.base import Base
from phatgoose.records import Task
from phatgoose.routers import PHATGOOSE, Router
from phatgoose.workflows.experiment.page import FORMAT, page_data
from phatgoose.workflows.traced import traced, with_cards


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a quickstart or an experiment, or the data that a page offers for download (then its results).

    Raises:
        EvaluationError: it is neither.
    """
    found = read_json(path, EvaluationError)
    if isinstance(found, dict) and str(found.get("format", "")).startswith("phatgoose-report/"):
        found = found.get("results")
    if isinstance(found, dict) and found.get("format") == FORMAT:
        return page_data(found)
    if not isinstance(found, dict) or "systems" not in found or "tasks" not in found:
        raise EvaluationError(
            f"{path} holds no results: expected a JSON object with tasks and systems, as results.json has."
        )
    return found


def page(
    out: Path,
    *,
    results: Mapping[str, Any] | None = None,
    base: Base | None = None,
    pool: Pool | None = None,
    router: Router | None = None,
    tasks: Sequence[Task] = (),
    texts: Sequence[str] = (),
    new_tokens: int = 24,
    backend: str = "auto",
) -> Path:
    """Writes the page. With a pool and its base, experts get cards, `tasks` profiles and an answer each, `texts` an answer each.

    Raises:
        EvaluationError: there is nothing to show, or the results are malformed.
    """
    data: dict[str, Any] = dict(results or {"tasks": [], "systems": []})
    if pool is None or base is None:
        if not data["systems"]:
            raise EvaluationError("there is nothing to show: give results, or a pool.")
        return report(data, out=out)
    seen = traced(
        base, pool, router or PHATGOOSE(), tasks, shown=len(tasks), texts=texts, new_tokens=new_tokens, backend=backend
    )  # fmt: skip
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
    return report(data, seen.prompts, out=out)
