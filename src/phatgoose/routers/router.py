"""The contract of a router: settings, bound to each module of a pool, give a choice per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from phatgoose.experts.expert import Expert
from phatgoose.ops import Backend
from phatgoose.ops.update import Update
from phatgoose.routers.context import RoutingContext


@dataclass(frozen=True, eq=False)
class Candidates:
    """The experts that can act at one module, in the order of the stack.

    `names` are of all experts in the pool; `members` index them: candidate i is names[members[i]], and −1 is the null
    candidate (no update). `gates`: one float32 vector [d_in] per candidate, or None where it has none. `updates`: what each
    candidate does here, None for the null candidate; nothing of them is read or copied unless a router does.
    """

    path: str
    names: tuple[str, ...]
    members: tuple[int, ...]
    gates: tuple[Tensor | None, ...]
    d_in: int
    updates: tuple[Update | None, ...] = ()


class Encoder(Protocol):
    """A sentence encoder: texts → float32 [n, width], rows of length 1."""

    name: str
    sha256: str

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Setup:
    """What a router may look at once, before it is bound to any module."""

    experts: tuple[Expert, ...]
    """The pool's, in its order."""
    decode: Callable[[Sequence[int]], str] | None
    """Token ids → text, without special tokens; None where the base's tokenizer is unknown."""
    encoder: Callable[[str], Encoder]
    """Loads a sentence encoder by name."""


class BoundRouter(ABC):
    """A router at one module."""

    needs_reference = False
    """Whether it must `observe` the base's own inputs of this module on reference text before it can route."""

    by_gates: tuple[Tensor, int] | None = None
    """(gates v̄ [candidates, d], top_k) where calling this router is gate_scores, then choose: a backend may fuse that with mix."""

    def observe(self, u: Tensor, ops: Backend) -> None:  # noqa: B027 - most routers need none
        """Takes in inputs [N, d] of the module on reference text; called before routing, if `needs_reference`."""

    @abstractmethod
    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        """Chosen candidates int64 [N, k] (−1: none) and their weights float32 [N, k] for inputs u [N, d]."""

    def check_observed(self) -> None:  # noqa: B027 - most routers need none
        """Called when `observe` has had all of the reference text.

        Raises:
            RoutingError: it was too little to go by.
        """

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor | None:
        """What the choice goes by, [N, candidates]; None if this router compares nothing. Asked for only by a trace with margins,
        beside the call above, so that nothing is kept or handed over where nobody looks."""
        return None


class Router(ABC):
    """Frozen settings of a way to route. Subclasses are dataclasses, so that their repr says it all."""

    offers_null = False
    """Whether a null candidate (no update, score 0) is offered at modules that only some experts adapt."""

    reads: str = ""
    """What of the experts' data signatures it needs: "activations", "texts", or nothing."""

    by_token = True
    """Whether a token's choice depends on nothing but its input, its id and its position. If not, evaluation shows the model each prompt
    whole and each answer alone, instead of what many have in common once."""

    def prepared(self, setup: Setup) -> Router:
        """The router that is bound to the modules: this one, unless it must look at the pool as a whole first.

        Raises:
            RoutingError: an expert lacks what this router needs, by name.
        """
        return self

    @abstractmethod
    def bind(self, candidates: Candidates) -> BoundRouter:
        """This router at one module.

        Raises:
            RoutingError: if an expert lacks what this router needs, by name.
        """

    def check(self, names: Sequence[str]) -> None:  # noqa: B027 - most routers need no check
        """Refuses a pool this router can't serve, before anything is attached."""

    def describe(self) -> dict[str, Any]:
        """Name and settings, for results."""
        return {"router": type(self).__name__, **getattr(self, "__dict__", {})}


class Prepared(Router):
    """A router that has looked at its pool; in all else it is `settings`."""

    def __init__(self, settings: Router):
        self.settings = settings

    @property
    def offers_null(self) -> bool:  # type: ignore[override]
        return self.settings.offers_null

    @property
    def reads(self) -> str:  # type: ignore[override]
        return self.settings.reads

    def describe(self) -> dict[str, Any]:
        return self.settings.describe()
