"""The contract of a router: settings, bound to each module of a pool, choose experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.ops import Backend
from phatgoose.ops.fused import Choice
from phatgoose.ops.update import Update
from phatgoose.routers.context import PassMemory, RoutingContext
from phatgoose.routers.markup import Markup


@dataclass(frozen=True, eq=False)
class Candidates:
    """The experts that can act at one module, in the order of the stack.

    `names` are those of all experts in the pool. `members` index them: candidate i is names[members[i]], and
    −1 is the null candidate, which has no update. `gates` holds one float32 vector [d_in] per candidate, or
    None where it has none. `updates` is what each candidate does here, None for the null candidate. Updates
    are only read or copied if a router does so.
    """

    path: str
    names: tuple[str, ...]
    members: tuple[int, ...]
    gates: tuple[Tensor | None, ...]
    d_in: int
    updates: tuple[Update | None, ...] = ()

    def by_expert(self) -> Tensor:
        """int64 [experts of the pool]: the candidate that each expert is here, −1 where it has none."""
        found = {member: candidate for candidate, member in enumerate(self.members)}
        return torch.tensor([found.get(expert, -1) for expert in range(len(self.names))])


@dataclass(frozen=True)
class Place:
    """Where a module stands in its model."""

    stack: str = "decoder"
    """"encoder" or "decoder"."""
    block: int | None = None
    """Number of its block, counted from 0; None outside of the blocks."""


class Encoder(Protocol):
    """A sentence encoder: texts → float32 [n, width], rows of length 1."""

    name: str
    sha256: str

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Setup:
    """What a router may look at once, before it is bound to any module."""

    experts: tuple[Expert, ...]
    """The pool's experts, in its order."""
    decode: Callable[[Sequence[int]], str] | None
    """Token ids → text without special tokens. None if the base's tokenizer is unknown."""
    encoder: Callable[[str], Encoder]
    """Loads a sentence encoder by name."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Of each module that the pool adapts, by its path; empty if they aren't known."""
    markup: Callable[[], Markup] | None = None
    """Finds out what the base's tokenizer puts before a text. None if that is unknown."""
    stacks: tuple[str, ...] = ("decoder",)
    """Those that the base has: its decoder, and an encoder–decoder's encoder."""


class BoundRouter(ABC):
    """A router at one module. One that compares scores extends `ByScores` instead."""

    needs_reference = False
    """Whether it must `observe` the base's own inputs of this module on reference text before it can route."""

    needs_plain = False
    """Whether it must `observe_plain` passages of plain text too, before the reference text."""

    whole_passes = False
    """Whether there is `in_whole_pass`, which costs less than `__call__`."""

    acts = True
    """Whether any expert may act here. If not, `__call__` is for what it notes, and chooses nobody."""

    by_gates: tuple[Tensor, int] | None = None
    """(gates v̄ [candidates, d], top_k) if it calls gate_scores, then choose. A backend may fuse that with mix."""

    def observe(self, u: Tensor, ops: Backend) -> None:  # noqa: B027 - most routers need none
        """Takes in inputs [N, d] of the module on reference text. Called before routing, if `needs_reference`."""

    def observe_plain(self, u: Tensor, ops: Backend) -> None:  # noqa: B027 - most routers need none
        """Takes in inputs [passages, T, d] of the module on passages of plain text. Called once, before `observe`, if
        `needs_plain`."""

    def in_whole_pass(self, u: Tensor, memory: PassMemory, ops: Backend) -> Choice | None:
        """As `__call__` at a module that sees all tokens of the pass, in order; None if nobody acts. Only asked if the
        router `remembers`: what it has chosen once, for a pass, it needn't work out again for every module."""
        raise NotImplementedError

    @abstractmethod
    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        """Chosen candidates int64 [N, k] (−1: none) and their weights float32 [N, k] for inputs u [N, d]."""

    def check_observed(self) -> None:  # noqa: B027 - most routers need none
        """Called after `observe` has seen all of the reference text. Raises RoutingError if it was too little."""

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor | None:
        """The scores that the choice compares, [N, candidates], or None if it compares none.

        Only a trace with margins asks for them, beside the call above. Nothing is kept otherwise.
        """
        return None


class ByScores(BoundRouter):
    """A router that compares scores: the `top_k` candidates with the highest act, weighted by a softmax over
    their scores.

    Experts can be switched off for any router of this kind (`Masked`): their scores become −∞. A router whose
    score for one candidate depends on the others must heed `context.allowed` itself. Overriding `__call__` is
    only right if the result is the same.
    """

    of_whole_pool = False
    """Whether it chooses among all experts of the pool, also those that have nothing here. Then it heeds `context.on`
    itself, in `__call__` and in `scores`."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def check_on(self, on: Tensor) -> None:
        """Raises RoutingError if it can't be as if the pool had only the experts that are on, bool [rows, experts]."""

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        return ops.choose(self.scores(u, context, ops), self.top_k)

    @abstractmethod
    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        """The score of each candidate on each token, [N, candidates]."""


class Router(ABC):
    """Frozen settings of a router. Subclasses are dataclasses; their fields are what the command line can set."""

    paper: ClassVar[str] = ""
    """Where it comes from, for the table of routers."""
    needs: ClassVar[str] = ""
    """What it needs of the pool, for the table of routers."""
    chooses: ClassVar[str] = ""
    """How many experts act, on what, for the table of routers."""

    control: ClassVar[bool] = False
    """Whether it is no method, but something to compare methods with."""

    offers_null = False
    """Whether a null candidate (no update, score 0) is offered at modules that only some experts adapt."""

    reads: str = ""
    """Which part of the experts' data signatures it needs: "activations", "prompts", "texts", or nothing."""

    remembers = False
    """Whether it keeps something of each sequence from pass to pass (`RoutingContext.memory`)."""

    by_token = True
    """Whether a token's choice depends on nothing but its input, its id and its position. If False, an
    evaluation runs each prompt and answer separately, instead of computing once what several prompts have in common."""

    def prepared(self, setup: Setup) -> Router:
        """The router that is bound to the modules: this one, unless it must look at the pool as a whole first.

        Raises:
            RoutingError: an expert, given by name, lacks what this router needs.
        """
        return self

    @abstractmethod
    def bind(self, candidates: Candidates) -> BoundRouter:
        """This router at one module.

        Raises:
            RoutingError: an expert, given by name, lacks what this router needs.
        """

    def check(self, names: Sequence[str]) -> None:  # noqa: B027 - most routers need no check
        """Refuses a pool with experts of these names, before anything is attached."""

    def describe(self) -> dict[str, Any]:
        """Name and settings, for results."""
        return {"router": type(self).__name__, **getattr(self, "__dict__", {})}


@dataclass(frozen=True)
class TopK(Router):
    """A router whose only setting, or first one, is how many experts act."""

    top_k: int = 2
    """How many experts act on each token."""

    chooses = "top_k experts per token and module"

    def __post_init__(self) -> None:
        check_at_least(self, top_k=1)


@dataclass(frozen=True)
class Drawn(Router):
    """A control that draws what it does from a seed."""

    seed: int = 0
    """Seed of the draws."""
    top_k: int = 2
    """How many experts act on each token."""

    control = True

    def __post_init__(self) -> None:
        check_at_least(self, top_k=1)


_SIGNED = {
    "activations": "mean activations of its data",
    "prompts": "mean prompts",
    "texts": "embedded training texts",
}


def signed(router: Router, setup: Setup) -> list[Any]:
    """What a router `reads` of every expert's data signature. Raises RoutingError for an expert that lacks it."""
    found = []
    for expert in setup.experts:
        part = getattr(expert.signature, router.reads, None)
        if part is None:
            raise RoutingError(
                f"expert {expert.name!r} has no {_SIGNED[router.reads]}, which {type(router).__name__} needs: its "
                "contributor makes them with `phatgoose signature`. Or choose another router."
            )
        found.append(part)
    return found


class SignatureRouter(Router):
    """A router that reads the experts' data signatures, so that `prepared` must come before `bind`."""

    def bind(self, candidates: Candidates) -> BoundRouter:
        raise RoutingError(f"{type(self).__name__} reads data signatures: attach it with route().")


class PreparedRouter(Router):
    """`settings`, which have looked at their pool: `binds` is their `bind`, and all else is as they say."""

    def __init__(self, settings: Router, binds: Callable[[Candidates], BoundRouter]):
        self.settings, self.binds = settings, binds
        self.offers_null, self.reads = settings.offers_null, settings.reads
        self.remembers = settings.remembers

    def bind(self, candidates: Candidates) -> BoundRouter:
        return self.binds(candidates)

    def describe(self) -> dict[str, Any]:
        return self.settings.describe()


def check_at_least(router: Router, **least: int) -> None:
    """Raises RoutingError unless each of these settings is a whole number of at least the given value."""
    for name, value in least.items():
        found = getattr(router, name)
        if isinstance(found, bool) or not isinstance(found, int) or found < value:
            raise RoutingError(f"{name} is {found!r}, expected a whole number of at least {value}.")


def check_bool(router: Router, *names: str) -> None:
    """Raises RoutingError unless each of these settings is True or False."""
    for name in names:
        if not isinstance(found := getattr(router, name), bool):
            raise RoutingError(f"{name} is {found!r}, expected True or False.")
