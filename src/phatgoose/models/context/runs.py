"""`Run`: one pass of an encoder or decoder, and which tokens it runs over."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from phatgoose.errors import RoutingError
from phatgoose.models.context.caches import Caches, Past
from phatgoose.models.context.matching import is_repeated
from phatgoose.routers.context import Sequences, positions_from


@dataclass(eq=False)
class Run:
    """One pass of a stack over [rows, length] tokens. given: its arguments. encoded: what its cross-attention reads."""

    given: dict[str, Any]
    shape: tuple[int, int]
    device: torch.device
    past: Past
    encoded: weakref.ref[Tensor] | None
    problem: str | None
    before: Tensor | None = field(default=None, init=False)
    """In a decoder: what the encoder returned since the last pass, of which `encoded` may be a copy."""
    sequences: Sequences | None = field(default=None, init=False)
    """Built when they are first asked for."""

    def built(self) -> Sequences:
        if self.sequences is None:
            self.sequences = _sequences(self)
        return self.sequences


class EncoderRuns:
    """Which run of the encoder returned which states; forgotten with the states."""

    def __init__(self) -> None:
        self._runs: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __reduce__(self) -> Any:
        return type(self), ()  # a copied model's encoder has returned nothing yet

    def keep(self, states: Tensor, run: Run) -> None:
        self._runs[states] = run

    def run_of(self, encoded: Tensor, last: Tensor | None) -> Run | None:
        """The run that returned these states, or `last`, if these are its rows, each repeated (beams); else None."""
        if encoded not in self._runs:
            if last is None or not is_repeated(encoded, last):
                return None
            self._runs[encoded] = self._runs[last]
        found: Run = self._runs[encoded]
        return found


def run_of(given: dict[str, Any], caches: Caches) -> Run:
    """The run of a stack that was called with `given`."""
    source, problem = given.get("input_ids"), None
    if not isinstance(source, Tensor):
        source = given.get("inputs_embeds")
    if not isinstance(source, Tensor) or source.ndim < 2:
        source, problem = (
            torch.empty(0, 0),
            "the pass was given neither input_ids nor inputs_embeds, [rows, tokens].",
        )
    encoded = given.get("encoder_hidden_states")
    kept = {name: given.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
    shape = (source.shape[0], source.shape[1])
    past = caches.before(given, *shape)  # before the pass: the cache grows while it runs
    encoded = weakref.ref(encoded) if isinstance(encoded, Tensor) else None
    return Run(kept, shape, source.device, past, encoded, problem or past.problem)


def _sequences(run: Run) -> Sequences:
    (batch, length), past, problem = run.shape, run.past, run.problem
    try:
        positions, real = positions_from(
            run.given["attention_mask"], batch, length, past.tokens, run.device, past.real
        )
    except RoutingError as error:  # raised when somebody asks: most routers look at activations alone
        problem = problem or str(error)
        positions, real = positions_from(None, batch, length, past.tokens, run.device)
    given = run.given["position_ids"]
    if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == length:
        positions = given.expand(batch, length).to(torch.long)
    return Sequences(run.given["input_ids"], positions, real, past.tokens, run.encoded, problem)
