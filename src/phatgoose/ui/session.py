"""The model behind the page: what may be asked of it, and answering, one question at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError, PluginError, RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route_with, routing_of, unroute
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.module_names import ModuleLocation, locate_modules
from phatgoose.models.context.prompted import prompted
from phatgoose.models.text.encoding import encode_chat, encode_prompt
from phatgoose.models.text.generate import greedy_answer, max_answer_tokens
from phatgoose.models.trace.record import trace
from phatgoose.registry import unknown
from phatgoose.routers import Router
from phatgoose.routers.fitting import fitting_router
from phatgoose.routers.masked import Masked, Switches
from phatgoose.routers.parse import BASE, REQUIRED, ROUTERS, parse_router, router_class, settings_of
from phatgoose.ui.pieces import Pieces
from phatgoose.ui.turns import Job
from phatgoose.workflows.prompt_forms import read_of_turn


@dataclass(frozen=True)
class Limits:
    """What one question may cost. Whatever is above is refused, but for tokens that don't fit into the model's context."""

    body_bytes: int = 2**18
    """Of a request."""
    prompt_tokens: int = 2048
    """Of a prompt, with its chat template."""
    new_tokens: int = 512
    """Of an answer."""
    choices: int = 2**22
    """Tokens × modules × choices of one answer: about six bytes each on their way to the page."""
    waiting: int = 4
    """Questions that may wait behind the one that is answered."""


@dataclass(frozen=True)
class Ask:
    """One question, as the page sends it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    prompt: str
    router: str = ""
    """A router's name, or "base" for the base alone; empty: the first that the page offers."""
    top_k: int | None = None
    """Its top-k; None: its own. Routers that have none take none."""
    off: list[int] = field(default_factory=list)
    """Experts that are switched off, by their place in the pool."""
    chat: bool = False
    """Whether the prompt goes through the model's chat template."""
    max_new_tokens: int = 64


def offered_routers(pool: Pool | None = None) -> list[dict[str, Any]]:
    """{"name", "top_k"} of every router that needs nothing but a pool, and the base; top_k is None if it has none.

    The first one suits the pool best: PHATGOOSE if all experts have gates. Routers that read gates or data signatures which some
    of this pool's experts lack are left out, and so are routers of other packages that can't be imported.
    """
    found = []
    first = fitting_router(pool.experts)[0] if pool else "phatgoose"
    if first.startswith("phatgoose:"):  # the page has no setting for experts without gates
        first = "weight-only"
    for name in sorted(ROUTERS, key=lambda name: (name != first, name)):
        # Single is left out: one expert alone is what is left when the others are switched off.
        if name == "single" or (name in ("phatgoose", "shuffled-gates") and first != "phatgoose"):
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
    return signature is not None and (signature.has_texts if what == "texts" else signature.has_activations)


class Session:
    """A base and a pool. `answer` is called by one thread at a time."""

    def __init__(
        self, base: Base, pool: Pool, options: RouteOptions | None = None, *, limits: Limits | None = None
    ) -> None:
        self.base, self.pool, self.options = base, pool, options or RouteOptions()
        self.limits = Limits() if limits is None else limits
        self.routers = {router["name"]: router for router in offered_routers(pool)}
        self._attached: tuple[str, Switches | None] | None = None  # what is routed now
        route_with(base, pool, parse_router("uniform"), self.options)  # refuses a pool of another base
        self.locations = self._locations()
        unroute(base)

    def _locations(self) -> dict[str, ModuleLocation]:
        routing = routing_of(self.base)
        assert routing is not None
        modules = routing.pool.modules
        return locate_modules(modules, [routing.streams.stream_of(path) for path in modules])

    def check(self, ask: Ask) -> None:
        """Refuses what can be refused before the model is asked.

        Raises:
            PhatgooseError: a setting is unknown or out of its range; says what is expected.
        """
        ask = self._with_router(ask)
        if not ask.prompt.strip():
            raise PhatgooseError("the prompt is empty.")
        if any("\ud800" <= c <= "\udfff" for c in ask.prompt):
            raise PhatgooseError("the prompt holds half a character (a lone surrogate), which is no text.")
        if ask.router not in self.routers:
            raise unknown("router", ask.router[:100], self.routers)
        if ask.top_k is not None and (
            self.routers[ask.router]["top_k"] is None or not 1 <= ask.top_k <= len(self.pool)
        ):
            raise RoutingError(
                f"top_k is {ask.top_k} for router {ask.router!r}: expected 1 to {len(self.pool)}, and only for routers that have one."
            )
        if len(set(ask.off)) < len(ask.off) or not all(0 <= i < len(self.pool) for i in ask.off):
            raise RoutingError(f"off should name experts of the pool, 0 to {len(self.pool) - 1}, each once.")
        if not 1 <= ask.max_new_tokens <= self.limits.new_tokens:
            raise PhatgooseError(
                f"max_new_tokens is {ask.max_new_tokens}, expected 1 to {self.limits.new_tokens}."
            )

    def answer(self, ask: Ask, job: Job) -> None:
        """Answers greedily, telling `job` {"event": "turn", "read", "generated_from", "room"} (how many tokens are read, which is the
        answer's first, how many there may be), then what `Pieces` says of each step, then {"event": "end", "answer", "why" (end, length
        or stopped), "tokens", "seconds"}.

        Raises:
            PhatgooseError: the router refuses, or the prompt is too long.
        """
        began = time.monotonic()
        ask = self._with_router(ask)
        ids = self._encoded(ask)
        count = ids.shape[1]
        room = max_answer_tokens(self.base, count, ask.max_new_tokens)
        self._bounded(ask, count + room)
        self._attach(ask)
        start = 1 if self.base.is_encoder_decoder else count
        job.tell({"event": "turn", "read": count, "generated_from": count, "room": room})
        told = read_of_turn(self.pool, ask.prompt) if ask.chat else []
        with prompted(self.base, told):
            out = self._generate(ids.to(self.base.device), room, job, alone=ask.router == BASE)
        answer = out[0, start:]
        why = "stopped" if job.stopped.is_set() else "length" if len(answer) >= room else "end"
        text = str(self.base.tokenizer.decode(answer, skip_special_tokens=True))
        seconds = round(time.monotonic() - began, 3)
        job.tell(
            {"event": "end", "answer": text.strip(), "why": why, "tokens": len(answer), "seconds": seconds}
        )

    def _with_router(self, ask: Ask) -> Ask:
        return ask if ask.router else replace(ask, router=next(iter(self.routers)))

    def _encoded(self, ask: Ask) -> Tensor:
        turn = [{"role": "user", "content": ask.prompt}]
        ids = encode_chat(self.base, turn) if ask.chat else encode_prompt(self.base, ask.prompt)
        if ids.shape[1] > self.limits.prompt_tokens:
            raise PhatgooseError(
                f"the prompt has {ids.shape[1]} tokens, at most {self.limits.prompt_tokens} are taken: shorten it."
            )
        return ids

    def _bounded(self, ask: Ask, tokens: int) -> None:
        if ask.router == BASE:
            return
        own = self.routers[ask.router]["top_k"]
        k = (
            min(len(self.pool), ask.top_k or own or len(self.pool)) + 1
        )  # a null candidate may be chosen as well
        if (need := tokens * len(self.locations) * k) > self.limits.choices:
            raise PhatgooseError(
                f"{tokens} tokens at {len(self.locations)} modules with up to {k} choices are {need:,} choices to show, at most "
                f"{self.limits.choices:,} are taken: shorten the prompt or the answer, or take a smaller top-k."
            )

    def _attach(self, ask: Ask) -> None:
        if ask.router == BASE:
            unroute(self.base)
            self._attached = None
            return
        text = ask.router if ask.top_k is None else f"{ask.router}:top_k={ask.top_k}"
        known, switches = self._attached or ("", None)
        if known != text or (ask.off and switches is None):
            router: Router = parse_router(text)
            switches = Switches() if ask.off else None
            # Not every router's experts can be switched off one by one, so that is asked for only when somebody does.
            routed = router if switches is None else Masked(router, switches)
            route_with(self.base, self.pool, routed, self.options)
            self._attached = text, switches
        if switches is not None:
            allowed = torch.ones(1, len(self.pool), dtype=torch.bool)
            allowed[0, ask.off] = False
            switches.allowed = allowed if ask.off else None

    def _generate(self, ids: Tensor, room: int, job: Job, *, alone: bool) -> Tensor:
        where = {} if alone else self.locations
        pieces = Pieces(self.base.tokenizer, where, ids, self.base.is_encoder_decoder)
        if alone:
            return greedy_answer(self.base, ids, room, lambda so_far: _told(job, pieces.event(so_far, ())))
        with trace(self.base, margins=False) as recorded:
            return greedy_answer(
                self.base, ids, room, lambda so_far: _told(job, pieces.event(so_far, recorded.drain()))
            )


def _told(job: Job, event: dict[str, Any]) -> bool:
    job.tell(event)
    return job.stopped.is_set()
