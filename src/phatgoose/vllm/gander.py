"""Gander in one process of vLLM: the evidence of each request, kept beside the key-value cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.errors import RoutingError
from phatgoose.ops import Stack, backend
from phatgoose.ops.fused import Choice
from phatgoose.ops.operators import routed_mix
from phatgoose.routers.context import PassMemory, Sequences
from phatgoose.routers.gander import Reading
from phatgoose.routers.router import Candidates
from phatgoose.vllm.site import StackSlice
from phatgoose.vllm.steps import BlockStates, Request, Step

KEY = "phatgoose.gander"
"""Where the `GanderRun` is among what a pass of vLLM can find (`ForwardContext.no_compile_layers`)."""


class GanderRun:
    """Who acts on the tokens of a step, and what is kept for the steps after it.

    Args:
        reading: shown the reference text; it has read nothing of any request.
        names: of the pool's experts.
        block_size: finds out how many tokens a block of the key-value cache holds.
        device: the type of the model's device, such as "cpu".
    """

    def __init__(self, reading: Reading, names: tuple[str, ...], block_size: Callable[[], int], device: str):
        self.reading, self.ops, self._block_size = reading, backend("auto", device), block_size
        # As at a module that every expert adapts.
        self.whole_pool = reading.bind(Candidates("", names, tuple(range(reading.experts)), (), 0))
        self.kept = BlockStates(reading.experts + 2)
        self.acting: dict[str, Candidates] = {}
        """The candidates at each module at which experts act."""
        self._pass: _Pass | None = None

    def running(self, context: Any) -> _Pass:
        """What is known of the pass whose forward context of vLLM this is."""
        if self._pass is None or self._pass.context() is not context:
            self._pass = _Pass(self, context, self._step(context.attn_metadata))
        return self._pass

    def _step(self, metadata: Any) -> Step | None:
        if metadata is None:  # vLLM measures or warms up
            return None
        if not isinstance(metadata, dict):
            raise RoutingError(
                "vLLM runs a step in several micro-batches, which Gander can't: turn that off."
            )
        return Step.of(next(iter(metadata.values()), None), self._block_size())


class _Pass:
    """One forward pass of vLLM."""

    def __init__(self, owner: GanderRun, context: Any, step: Step | None):
        self.owner, self.step, self.context = owner, step, weakref.ref(context)
        self._memory: PassMemory | None = None
        self._choice: Choice | None = None
        self._here: dict[object, Choice] = {}
        """The choice as it is at modules with the same candidates."""

    def see(self, ids: Tensor) -> None:
        """Takes in the ids of the tokens and of what pads them, int [≥ N]. Before anything else."""
        if (step := self.step) is None:
            return
        if ids.ndim != 1 or len(ids) < step.tokens:
            raise RoutingError(
                f"vLLM embeds {list(ids.shape)} tokens in a step of {step.tokens}: Gander can't route this model."
            )
        positions = torch.cat([torch.arange(r.first, r.first + r.tokens) for r in step.requests])
        own = ids[: step.tokens].long().clone()
        tokens = Sequences(
            own[None], positions[None].to(ids.device), torch.ones_like(own, dtype=torch.bool)[None]
        )
        self._memory = PassMemory(tokens, previous=lambda: None)

    def read(self, path: str, u: Tensor) -> None:
        """Takes in the inputs [≥ N, d] of a module that is read."""
        if (step := self.step) is not None:
            self._check(path, u, step)
            self.owner.reading.readers[path].in_whole_pass(u[: step.tokens], self._known(), self.owner.ops)

    def choice(self, path: str, u: Tensor) -> Choice:
        """Who acts on inputs [≥ N, d] of a module, of its candidates."""
        if self.step is not None:
            self._check(path, u, self.step)
        if self._choice is None:
            self._choice = self._choose(u)
        places = self.owner.reading.places(self.owner.acting[path])
        if (known := self._here.get(places)) is None:
            here = places.here(self._choice.chosen)
            known = self._here[places] = Choice(here, self._choice.weights)
        return known

    def _choose(self, u: Tensor) -> Choice:
        """The pool's experts, by number, for all tokens of the pass. Nobody acts on padding."""
        owner, step = self.owner, self.step
        k = min(owner.reading.settings.top_k, owner.reading.experts)
        chosen = torch.full((len(u), k), -1, device=u.device)
        weights = torch.full((len(u), k), 1 / k, device=u.device)
        if step is not None:
            for requests in step.rounds():
                single = [r for r in requests if r.tokens == 1]
                for some in [*([single] if single else []), *([r] for r in requests if r.tokens > 1)]:
                    rows = torch.cat([torch.arange(r.begin, r.begin + r.tokens) for r in some]).to(u.device)
                    found = self._choose_for(some, rows, u)
                    chosen[rows], weights[rows] = found.chosen, found.weights
            self._known().notes.clear()  # as large as what was summed
        return Choice(chosen, weights)

    def _choose_for(self, requests: Sequence[Request], rows: Tensor, u: Tensor) -> Choice:
        """The same for the tokens `rows` of requests that have equally many."""
        owner, whole, shape = self.owner, self._known(), (len(requests), requests[0].tokens)

        def part(x: Tensor) -> Tensor:
            return x[0, rows.to(x.device)].reshape(*shape, *x.shape[2:])

        tokens = whole.sequences
        assert tokens.ids is not None
        own = Sequences(part(tokens.ids), part(tokens.positions), part(tokens.real))
        memory = PassMemory(own, lambda: owner.kept.before(requests))
        memory.notes.update({key: part(note) for key, note in whole.notes.items()})
        choice = owner.whole_pool.in_whole_pass(u, memory, owner.ops)
        assert choice is not None
        assert memory.after is not None
        owner.kept.keep(requests, memory.after)
        return choice

    def _known(self) -> PassMemory:
        if self._memory is None:
            raise RoutingError(
                "Gander hasn't seen the ids of a step's tokens, by which it tells where a text begins: it can't be "
                "used with embeddings in place of tokens."
            )
        return self._memory

    def _check(self, path: str, u: Tensor, step: Step) -> None:
        if u.ndim != 2 or len(u) < step.tokens:
            raise RoutingError(
                f"{path} sees {list(u.shape[:-1])} tokens in a step of {step.tokens}: vLLM splits or skips tokens "
                "there, which Gander can't follow. Turn off what does so, or use `phatgoose serve`."
            )


def running() -> _Pass:
    """What Gander knows of vLLM's running pass."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    found: _Pass = context.no_compile_layers[KEY].running(context)
    return found


# Operators, so that compiled graphs keep these calls. What the model goes on with is made by them, so that they run
# once each and in the model's order.


@torch.library.custom_op("phatgoose::vllm_see", mutates_args=())
def see(ids: Tensor) -> Tensor:
    """Notes the ids of a pass's tokens, and returns a copy."""
    running().see(ids)
    return ids.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("phatgoose::vllm_read", mutates_args=())
def read(u: Tensor, y: Tensor, path: str) -> Tensor:
    """Notes what the module `path` sees, u [N, d], and returns a copy of y."""
    running().read(path, u)
    return y.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("phatgoose::vllm_act", mutates_args=())
def act(u: Tensor, y: Tensor, rows: Sequence[Tensor], widest: int, path: str) -> Tensor:
    """y + Σ w Δ(u) of the experts that Gander has chosen for the module `path`, as `routed_mix`."""
    choice = running().choice(path, u)
    mixed: Tensor = routed_mix(u, y, choice.chosen, choice.weights, rows, widest)
    return mixed


@see.register_fake
def _(ids: Tensor) -> Tensor:
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


@read.register_fake
def _(u: Tensor, y: Tensor, path: str) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@act.register_fake
def _(u: Tensor, y: Tensor, rows: Sequence[Tensor], widest: int, path: str) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def see_first(embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook on a model's table of tokens."""
    return (see(args[0]), *args[1:])


class ReadLayer(nn.Module):
    """A layer that holds modules which Gander reads: the base acts."""

    def __init__(self, paths: Sequence[str]):
        super().__init__()
        self.paths = tuple(paths)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """y, as u [..., inputs] of the layer has been read."""
        flat = u.reshape(-1, u.shape[-1])
        for path in self.paths:
            y = read(flat, y, path)
        return y


class ActingSlice(StackSlice):
    """Adds the updates that Gander has chosen to a module's part of a layer's output.

    Args:
        path: the module's.
        stack: as `StackSlice`.
    """

    def __init__(self, path: str, stack: Stack, device: torch.device):
        super().__init__(stack, device)
        self.path = path

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """y + Σ w Δ(u), a new tensor. u: [N, inputs this rank gets], y: [N, outputs it has]."""
        return act(u, y, self.rows(), self.widest, self.path)
