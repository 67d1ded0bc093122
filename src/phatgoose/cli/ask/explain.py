"""`phatgoose explain`: which experts an answer rests on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import (
    AT_LEAST_1,
    BackendOption,
    BaseOptions,
    ChatOption,
    PoolFolderOption,
    PromptArgument,
    RouterOption,
    read_prompt,
)
from phatgoose.cli.measure import show
from phatgoose.errors import RoutingError

if TYPE_CHECKING:
    from phatgoose.workflows.evidence import Evidence
    from phatgoose.workflows.explain import Explanation

SHOWN_TOKENS = 10
"""Tokens of the table that says which of them set two experts apart."""


@dataclass(frozen=True)
class AnswerOptions(Options):
    """The answer, and how much of it is explained."""

    max_new_tokens: Annotated[int, AT_LEAST_1] = 64
    """Most tokens of the answer."""
    most: Annotated[int | None, AT_LEAST_1] = None
    """Look only at this many experts, those with the most weight."""
    chat: ChatOption = False
    json: bool = False
    """Print everything as one JSON object."""


@expand_options
def command(
    prompt: PromptArgument,
    pool: PoolFolderOption,
    base: BaseOptions,
    answer: AnswerOptions,
    router: RouterOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Say which experts an answer rests on: what changes without each of them, with each alone, and with none.

    Only a greedy answer can be explained, and only one of a router that chooses by scores. With gander, it also says
    which layers and tokens of the prompt spoke for which expert.
    """
    text = read_prompt(prompt)
    from phatgoose.cli.common.loading import load_with_choices
    from phatgoose.cli.common.streaming import encode, room_for
    from phatgoose.models.attach.options import RouteOptions
    from phatgoose.workflows.explain import ExplainOptions, explain, words

    model, experts, (choice,) = load_with_choices(pool, [router], base, RouteOptions(backend))
    if experts is None or choice.router is None or choice.merge:
        raise RoutingError(f"router {choice.text!r} has no experts to leave out; give one that routes.")
    ids, read = encode(model, experts, text, chat=answer.chat)
    options = ExplainOptions(room_for(model, ids, answer.max_new_tokens), answer.most, route=choice.options)
    found, _ = explain(model, experts, ids, choice.router, prompt=text, read=read, options=options)
    if answer.json:
        show.say(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    _show(found, words(found))


def _show(found: Explanation, lines: list[str]) -> None:
    show.say(found.answer.strip() or "(nothing but the end)")
    show.say()
    for line in lines:
        show.say(line)
    show.say()
    columns = ("expert", "share of routing", "without it", "answer kept", "it alone")
    rows = [
        (
            e.expert, f"{100 * e.share:.1f} %", f"{e.change:+.3f}", "yes" if e.keeps_answer else "no",
            f"{e.alone - found.log_likelihood:+.3f}",
        )
        for e in found.effects
    ]  # fmt: skip
    change = f"{found.base_log_likelihood - found.log_likelihood:+.3f}"
    rows.append(("(base alone)", "", change, "yes" if found.base_keeps_answer else "no", ""))
    show.table(columns, rows, numbers=columns[1:])
    show.note(
        f"in nats, against the whole pool, under which the answer's log-likelihood is {found.log_likelihood:.3f}"
    )
    if found.evidence is not None:
        _show_evidence(found.evidence)


def _show_evidence(found: Evidence) -> None:
    """Two tables: the strongest experts by the modules that were read, and the tokens that set the first two apart."""
    from phatgoose.models.base.module_names import layer_and_kind
    from phatgoose.workflows.evidence import STRONGEST

    show.say()
    places = [f"layer {layer}" for layer, _ in layer_and_kind(found.modules)]
    names = found.modules if len(set(places)) < len(places) else places
    columns = ("expert", "evidence", *names)
    parts = zip(found.experts, found.sums, found.by_module, strict=True)
    rows = [(name, f"{total:+.2f}", *(f"{part:+.2f}" for part in row)) for name, total, row in parts]
    show.table(columns, rows[:STRONGEST], numbers=columns[1:])
    show.note("what spoke for whom at the prompt's end, in all and in each layer that is read")
    if len(found.experts) < 2:
        return
    first, second = found.by_token[:2]
    by_gap = sorted(range(len(first)), key=lambda t: -abs(first[t] - second[t]))[:SHOWN_TOKENS]
    columns = ("place", "token", found.experts[0], found.experts[1], "difference")
    rows = [
        (
            str(t + 1), repr(found.tokens[t]), f"{first[t]:+.2f}", f"{second[t]:+.2f}",
            f"{first[t] - second[t]:+.2f}",
        )
        for t in sorted(by_gap)
    ]  # fmt: skip
    show.say()
    show.table(columns, rows, numbers=(columns[0], *columns[2:]))
    show.note(f"the tokens that most set {found.experts[0]} apart from {found.experts[1]}")
