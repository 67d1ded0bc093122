"""Trace a pool: routed prompts, each task's routing profile, a card for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phatgoose.analysis.activations import mean_inputs
from phatgoose.analysis.cards import cards
from phatgoose.analysis.measures import expert_shares, load
from phatgoose.analysis.page import RoutedPrompt, routed_prompt
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route_with, routing_of, unroute
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.module_names import layer_labels
from phatgoose.models.text.batch import decoder_inputs
from phatgoose.models.text.encoding import UNLIMITED, encode_answers, encode_input
from phatgoose.models.text.generate import greedy_answer
from phatgoose.models.trace.record import trace
from phatgoose.models.trace.result import Trace
from phatgoose.records import Example, Task
from phatgoose.routers import Router

PROFILE_ROWS = 16
MEAN_ROWS = 2


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
    """{"layers": labels, "experts": names, "shares": [layer][expert]}: each layer's mean over its modules of their
    load."""
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


def answer_traced(base: Base, ids: torch.Tensor, new_tokens: int) -> tuple[Trace, torch.Tensor]:
    """The trace of a greedy answer to the prompt `ids` [1, T], and the answer's tokens [A]."""
    with trace(base, margins=False) as recorded:
        out = greedy_answer(base, ids, new_tokens)
    return recorded, out[0, 1 if base.is_encoder_decoder else ids.shape[1] :]


def _answer(base: Base, task: str, example: Example, new_tokens: int) -> RoutedPrompt:
    targets, ids = example.targets, torch.tensor([encode_input(base, example)], device=base.device)
    recorded, tokens = answer_traced(base, ids, new_tokens)
    answer = str(base.tokenizer.decode(tokens, skip_special_tokens=True)).split("\n")[0].strip()
    return routed_prompt(
        recorded, base, task=task, prompt=example.input, expected=" / ".join(targets), answer=answer,
        correct=answer in targets if targets else None,
    )  # fmt: skip
