"""The HTML page of results and of a pool that is traced for it: its choices, profiles and cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from phatgoose.analysis import page as analysis_page
from phatgoose.analysis.activations import mean_inputs
from phatgoose.analysis.cards import cards
from phatgoose.analysis.measures import expert_shares, load
from phatgoose.analysis.prompts import RoutedPrompt, routed_prompt
from phatgoose.errors import EvaluationError
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json
from phatgoose.models.attach.attach import route_with, routing_of, unroute
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.module_names import layer_labels
from phatgoose.models.text.batch import decoder_inputs
from phatgoose.models.text.encoding import UNLIMITED, encode_answers, encode_input
from phatgoose.models.trace.record import trace, trace_answer
from phatgoose.models.trace.result import Trace
from phatgoose.records import Example, Task
from phatgoose.routers import PHATGOOSE, Router
from phatgoose.workflows.experiment.page import FORMAT, page_data

PROFILE_ROWS = 16
MEAN_ROWS = 2


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
    if results.get("format") != FORMAT:
        return results
    try:
        return page_data(results)
    except (KeyError, TypeError, AttributeError) as cause:
        raise EvaluationError(f"the experiment's results are incomplete or damaged: {cause!r}.") from cause


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
    """Writes the page. A pool with its base is traced: experts get cards, tasks profiles, and prompts answers.

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


@dataclass(frozen=True)
class TraceReport:
    """What tracing a pool on some tasks showed, in the forms that results.json and `report` take."""

    prompts: list[RoutedPrompt]
    """A greedy answer to the first test row of some tasks (and to given texts), with every choice."""
    shares: dict[str, dict[str, float]]
    """Task → expert → its share of the routing weight on the prompts of the task's first test rows. In an
    encoder–decoder the decoder reads their answers."""
    layers: dict[str, dict[str, Any]]
    """The same for each layer."""
    cards: list[dict[str, Any]]
    """One for each expert."""


@dataclass(frozen=True)
class TraceRequest:
    """What a pool is traced on."""

    tasks: Sequence[Task] = ()
    """All of them get a profile, from their first 16 test rows."""
    shown: int = 6
    """Of how many tasks the first test row is answered."""
    texts: Sequence[str] = ()
    """Prompts that are answered as well, after those of the tasks."""
    new_tokens: int = 24
    """Most tokens of an answer."""


def traced(
    base: Base, pool: Pool, router: Router, request: TraceRequest, options: RouteOptions | None = None
) -> TraceReport:
    """Traces a pool; the base is left without routing."""
    unroute(base)
    tasks, options = request.tasks, options or RouteOptions()
    samples = [*request.texts, *(e.input for task in tasks for e in task.test[:MEAN_ROWS])]
    route_with(base, pool, router, options)
    routing = routing_of(base)
    assert routing is not None
    here = routing.pool  # its modules have this model's names
    # Without routing, which would change what later modules read.
    unroute(base)
    means = mean_inputs(base, here.modules, samples) if samples else None
    route_with(base, pool, router, options)
    try:
        profiles = {task.name: _profile(base, task) for task in tasks}
        prompts = [_answer(base, t.name, t.test[0], request.new_tokens) for t in tasks[: request.shown]]
        prompts += [_answer(base, "", Example(text, ()), request.new_tokens) for text in request.texts]
    finally:
        unroute(base)
    shares = {n: {e: round(s, 4) for e, s in expert_shares(t).items()} for n, t in profiles.items()}
    total = {n: sum(s[n] for s in shares.values()) / len(shares) for n in pool.names} if shares else None
    layers = {name: layer_shares(t) for name, t in profiles.items()}
    return TraceReport(prompts, shares, layers, cards(here, means=means, shares=total))


def with_cards(
    records: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The records of results.json's experts, with what their cards add. What was measured goes before a card."""
    known = {card["name"]: card for card in found}
    return [{**known.get(record["name"], {}), **record} for record in records]


def layer_shares(t: Trace) -> dict[str, Any]:
    """{"layers": labels, "experts": names, "shares": [layer][expert]}: mean loads of each layer's modules."""
    loads = load(t)
    groups: dict[str, list[torch.Tensor]] = {}
    for path, label in layer_labels(t.locations).items():
        if path in loads:
            groups.setdefault(label, []).append(loads[path])
    return {
        "layers": list(groups),
        "experts": list(t.experts),
        "shares": [[round(s, 4) for s in torch.stack(of).mean(0).tolist()] for of in groups.values()],
    }


def _profile(base: Base, task: Task) -> Trace:
    with trace(base, histogram=True) as recorded, torch.no_grad():
        for row in task.test[:PROFILE_ROWS]:  # one by one: no padding, little memory
            batch = {"input_ids": torch.tensor([encode_input(base, row)], device=base.device)}
            if base.is_encoder_decoder:  # the decoder reads what it should write
                (encoded,) = encode_answers(base, row, row.targets[:1], UNLIMITED)
                labels = torch.tensor([encoded.target_ids], device=base.device)
                batch["decoder_input_ids"] = decoder_inputs(base.model, labels)
            base.model(**batch)
    return recorded


def _answer(base: Base, task: str, example: Example, new_tokens: int) -> RoutedPrompt:
    targets, ids = example.targets, torch.tensor([encode_input(base, example)], device=base.device)
    recorded, tokens = trace_answer(base, ids, new_tokens)
    answer = str(base.tokenizer.decode(tokens, skip_special_tokens=True)).split("\n")[0].strip()
    return routed_prompt(
        recorded, base, task=task, prompt=example.input, expected=" / ".join(targets), answer=answer,
        correct=answer in targets if targets else None,
    )  # fmt: skip
