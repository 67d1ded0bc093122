"""The model behind the page: check a question, then answer it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError, PluginError, RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import prompted, route_with, routing_of, unroute
from phatgoose.models.attach.fitting import fit_router
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.module_names import locate_modules
from phatgoose.models.text.encoding import encode_chat, encode_prompt
from phatgoose.models.text.generate import greedy_answer, max_answer_tokens
from phatgoose.models.trace.record import trace
from phatgoose.registry import unknown
from phatgoose.routers import Gander, Router
from phatgoose.routers.fitting import WITHOUT_POOL
from phatgoose.routers.masked import Masked, Switches
from phatgoose.routers.parse import BASE, REQUIRED, ROUTERS, parse_router, router_class, settings_of
from phatgoose.ui.queue import QueuedAnswer
from phatgoose.ui.token_events import TokenEvents
from phatgoose.workflows.evidence import STRONGEST, gathered
from phatgoose.workflows.prompt_forms import read_of_turn

TOKENS_APART = 6
"""Tokens that are named where two experts' evidence is set apart."""


@dataclass(frozen=True)
class Limits:
    """What one question may cost. Whatever is above is refused, but for tokens that don't fit into the model's
    context."""

    body_bytes: int = 2**18
    """Bytes of a request."""
    prompt_tokens: int = 2048
    """Tokens of a prompt, with its chat template."""
    new_tokens: int = 512
    """Tokens of an answer."""
    choices: int = 2**22
    """Tokens × modules × choices of one answer; each takes about six bytes on its way to the page."""
    waiting: int = 4
    """Questions that may wait while one is answered."""


@dataclass(frozen=True)
class Question:
    """One question, as the page sends it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    prompt: str
    router: str = ""
    """A router's name, or "base" for the base alone. Empty: the first that the page offers."""
    top_k: int | None = None
    """The router's top_k; None: its default. Only for routers that have one."""
    off: list[int] = field(default_factory=list)
    """Experts that are switched off, by their index in the pool."""
    chat: bool = False
    """Whether the prompt goes through the model's chat template."""
    max_new_tokens: int = 64


def offered_routers(pool: Pool | None = None, first: str = WITHOUT_POOL) -> list[dict[str, Any]]:
    """{"name", "top_k"} of every router that needs nothing but a pool, and the base; top_k is None if it has none.

    Routers that read gates or data signatures which some of this pool's experts lack are left out, and so are routers
    of other packages that can't be imported.

    Args:
        first: the router that suits the pool, which comes first.
    """
    found = []
    gated = pool is None or all(expert.gates is not None for expert in pool.experts)
    first = first if ":" not in first else "weight-only"  # the page has no setting for experts without gates
    for name in sorted(ROUTERS, key=lambda name: (name != first, name)):
        # Single is left out: one expert alone is what is left when the others are switched off.
        if name == "single" or (name in ("phatgoose", "shuffled-gates") and not gated):
            continue
        try:
            kind = router_class(name)
        except PluginError:
            continue
        if kind.reads and not (pool and all(_has(expert, kind.reads) for expert in pool.experts)):
            continue
        settings = settings_of(kind)
        if any(default is REQUIRED for _, default in settings.values()):
            continue
        _, top_k = settings.get("top_k", (int, None))
        found.append({"name": name, "top_k": min(top_k, len(pool)) if top_k and pool else top_k})
    return [*found, {"name": BASE, "top_k": None}]


def _has(expert: Expert, what: str) -> bool:
    signature = expert.signature
    return signature is not None and bool(getattr(signature, f"has_{what}"))


class Session:
    """A base and a pool. `answer` is called by one thread at a time."""

    def __init__(
        self, base: Base, pool: Pool, options: RouteOptions | None = None, *, limits: Limits | None = None
    ) -> None:
        self.base, self.pool, self.options = base, pool, options or RouteOptions()
        self.limits = Limits() if limits is None else limits
        self.fit = fit = fit_router(base, pool, self.options)  # refuses a pool of another base
        self.routers = {router["name"]: router for router in offered_routers(pool, fit.text)}
        self._attached: tuple[str, Switches | None] | None = None  # what is routed now
        route_with(base, pool, parse_router("uniform"), self.options)
        routing = routing_of(base)
        assert routing is not None
        modules = routing.pool.modules
        self.locations = locate_modules(modules, [routing.streams.stream_of(path) for path in modules])
        unroute(base)

    def check(self, question: Question) -> None:
        """Refuses a question (PhatgooseError) if that can be done without running the model."""
        question = self._with_router(question)
        if not question.prompt.strip():
            raise PhatgooseError("the prompt is empty.")
        if any("\ud800" <= c <= "\udfff" for c in question.prompt):
            raise PhatgooseError("the prompt holds half a character (a lone surrogate), which is no text.")
        if question.router not in self.routers:
            raise unknown("router", question.router[:100], self.routers)
        if question.top_k is not None and (
            self.routers[question.router]["top_k"] is None or not 1 <= question.top_k <= len(self.pool)
        ):
            raise RoutingError(
                f"top_k is {question.top_k} for router {question.router!r}: expected 1 to {len(self.pool)}, "
                "and only for routers that have one."
            )
        if len(set(question.off)) < len(question.off) or not all(
            0 <= i < len(self.pool) for i in question.off
        ):
            raise RoutingError(f"off should name experts of the pool, 0 to {len(self.pool) - 1}, each once.")
        if not 1 <= question.max_new_tokens <= self.limits.new_tokens:
            raise PhatgooseError(
                f"max_new_tokens is {question.max_new_tokens}, expected 1 to {self.limits.new_tokens}."
            )

    def answer(self, question: Question, queued: QueuedAnswer) -> None:
        """Answers greedily and sends events.

        They are: "turn" with the number of tokens read, the index of the answer's first and how many there may
        be ("read", "generated_from", "room"); "evidence" if Gander routes (`_evidence`); those of `TokenEvents` for
        each step; "end" with "answer", "why" (end, length or stopped), "tokens" and "seconds".

        Raises:
            PhatgooseError: the router refuses, or the prompt is too long.
        """
        began = time.monotonic()
        question = self._with_router(question)
        ids = self._encoded(question)
        count = ids.shape[1]
        room = max_answer_tokens(self.base, count, question.max_new_tokens)
        self._bounded(question, count + room)
        self._attach(question)
        start = 1 if self.base.is_encoder_decoder else count
        queued.send({"event": "turn", "read": count, "generated_from": count, "room": room})
        alone = question.router == BASE
        if not alone and isinstance(router := parse_router(question.router), Gander):
            queued.send(self._evidence(router, ids, question.off))
        where = {} if alone else self.locations
        events = TokenEvents(self.base.tokenizer, where, ids, self.base.is_encoder_decoder)
        prompts = read_of_turn(self.pool, question.prompt) if question.chat else []
        recording = contextlib.nullcontext() if alone else trace(self.base, margins=False)
        with prompted(self.base, prompts), recording as recorded:

            def after_each(so_far: Tensor) -> bool:
                return _send(queued, events.event(so_far, recorded.drain() if recorded else ()))

            out = greedy_answer(self.base, ids.to(self.base.device), room, after_each)
        answer = out[0, start:]
        why = "stopped" if queued.stopped.is_set() else "length" if len(answer) >= room else "end"
        text = str(self.base.tokenizer.decode(answer, skip_special_tokens=True))
        seconds = round(time.monotonic() - began, 3)
        queued.send(
            {"event": "end", "answer": text.strip(), "why": why, "tokens": len(answer), "seconds": seconds}
        )

    def _evidence(self, router: Gander, ids: Tensor, off: Sequence[int]) -> dict[str, Any]:
        """What spoke for whom at the end of a prompt [1, T].

        "experts" has the strongest of those that are on by their index, "sums" the evidence for each, and "apart" the
        tokens that most set the first apart from the second, each with its part of the difference.
        """
        on = {name for e, name in enumerate(self.pool.names) if e not in off}
        found = gathered(self.base, router, ids, on)
        places = [i for i, name in enumerate(found.experts) if name in on][:STRONGEST]
        apart: list[tuple[str, float]] = []
        if len(places) > 1:
            first, second = (found.by_token[i] for i in places[:2])
            gaps = [a - b for a, b in zip(first, second, strict=True)]
            widest = sorted(range(len(gaps)), key=lambda t: -abs(gaps[t]))[:TOKENS_APART]
            apart = [(found.tokens[t], round(gaps[t], 3)) for t in widest]
        return {
            "event": "evidence",
            "experts": [self.pool.names.index(found.experts[i]) for i in places],
            "sums": [round(found.sums[i], 3) for i in places],
            "apart": apart,
        }

    def _with_router(self, question: Question) -> Question:
        return question if question.router else replace(question, router=next(iter(self.routers)))

    def _encoded(self, question: Question) -> Tensor:
        turn = [{"role": "user", "content": question.prompt}]
        ids = encode_chat(self.base, turn) if question.chat else encode_prompt(self.base, question.prompt)
        if ids.shape[1] > self.limits.prompt_tokens:
            raise PhatgooseError(
                f"the prompt has {ids.shape[1]} tokens, at most {self.limits.prompt_tokens} are taken: shorten it."
            )
        return ids

    def _bounded(self, question: Question, tokens: int) -> None:
        if question.router == BASE:
            return
        own = self.routers[question.router]["top_k"]
        # A null candidate may be chosen as well.
        k = min(len(self.pool), question.top_k or own or len(self.pool)) + 1
        if (need := tokens * len(self.locations) * k) > self.limits.choices:
            raise PhatgooseError(
                f"{tokens} tokens at {len(self.locations)} modules with up to {k} choices are {need:,} "
                f"choices to show, at most {self.limits.choices:,} are taken: shorten the prompt or the "
                "answer, or take a smaller top-k."
            )

    def _attach(self, question: Question) -> None:
        if question.router == BASE:
            unroute(self.base)
            self._attached = None
            return
        text = question.router if question.top_k is None else f"{question.router}:top_k={question.top_k}"
        known, switches = self._attached or ("", None)
        if known != text or (question.off and switches is None):
            router: Router = parse_router(text)
            switches = Switches() if question.off else None
            # Masked refuses some routers, so it is only used when experts are switched off.
            routed = router if switches is None else Masked(router, switches)
            route_with(self.base, self.pool, routed, self.options)
            self._attached = text, switches
        if switches is not None:
            allowed = torch.ones(1, len(self.pool), dtype=torch.bool)
            allowed[0, question.off] = False
            switches.allowed = allowed if question.off else None


def _send(queued: QueuedAnswer, event: dict[str, Any]) -> bool:
    """Sends an event; True if the answer should stop."""
    queued.send(event)
    return queued.stopped.is_set()
