"""Gander: the first blocks gather evidence for each expert in what is read; later blocks act on it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.weight_signature import why_no_signature
from phatgoose.ops import Backend
from phatgoose.ops.fused import Choice
from phatgoose.routers.context import PassMemory, RoutingContext
from phatgoose.routers.markup import BEGUN, START, Markup
from phatgoose.routers.router import (
    BoundRouter,
    ByScores,
    Candidates,
    Place,
    PreparedRouter,
    Router,
    Setup,
    check_at_least,
)
from phatgoose.routers.weights import Calibrated, standardised_gate

BLOCKS_PER_READ = 6
"""One in so many of the adapted blocks is read, unless `layers` says otherwise."""
CROSSED = 0.05
"""The share of plain passages on which an expert stands out, if `doubt` is on."""
_SCANNED = 128
"""Tokens whose evidence is summed at a time."""
_VALUES = ("v_proj", "v", "value", "v_lin", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
"""What models call the projection to values, alone or with queries and keys."""
_LOCK = threading.Lock()
"""Guards what is worked out once of plain text, whose parts are let go then."""


@dataclass(frozen=True)
class Gander(Router):
    """The expert whose weights find the most evidence in all that was read so far (docs/method.md, "Gander").

    The first blocks act as the base does, and gather evidence. Of expert e at token t it is x_{t,e}, the mean over the
    read modules of z(‖P_e(ū_t − m)‖^⅔). ‖P_e(ū − m)‖ is the length of an input in the directions that the expert's
    update reads, its right-singular vectors V_e, where plain text varies equally in all directions (`whitened`); z is
    standardised on the reference text. For an expert without singular vectors it is z of its gate. x is summed with a
    forgetting window:

        L_t = γ L_{t−1} + x_t,   γ = 2^(−1/half_life)

    It begins with the text: what a chat template puts before it has read nothing of it, and is no evidence. There the
    base acts.

    In all later blocks the `top_k` experts with the highest L_{t,e} act on token t, weighted by a softmax over it. An
    encoder reads its whole text first, so there, and in its decoder, L is the sum over the whole text.
    """

    layers: int | None = None
    """How many of the blocks that the pool adapts are read. None: one in six of them, at least one."""
    half_life: int = 64
    """After how many tokens evidence counts half. In an encoder nothing is forgotten."""
    top_k: int = 1
    """How many experts act on each token."""
    doubt: bool = False
    """Whether the base acts where no expert stands out: where max_e S_{t,e} − mean_e S_{t,e} isn't above what one in
    twenty passages of plain text pass, S being the evidence per token, with a 0 among those averaged."""

    paper = "ours"
    needs = "LoRA weights (or gates), one pass of the base"
    chooses = "top_k experts for all that was read so far"
    remembers = True
    by_token = False

    def __post_init__(self) -> None:
        check_at_least(self, half_life=1, top_k=1)
        if self.layers is not None:
            check_at_least(self, layers=1)

    def prepared(self, setup: Setup) -> Router:
        return PreparedRouter(self, Reading.of(self, setup).bind)

    def bind(self, candidates: Candidates) -> BoundRouter:
        raise RoutingError("Gander looks at the whole pool first: attach it with route().")


class Reading:
    """Which modules are read for which expert, and what they have found in a pass.

    Args:
        read: module path → the experts, by number, whose evidence is taken there.
        waiting: modules that act as the base, since they run before all evidence is there.
        blocks: of each expert, the numbers of the blocks that it adapts, in the stack that is read.
        markup: tells where a sequence's text begins. None: with its first token.
        whole: whether it is an encoder that is read, which has the whole text before it.
    """

    def __init__(
        self,
        settings: Gander,
        read: Mapping[str, tuple[int, ...]],
        waiting: frozenset[str],
        blocks: Sequence[frozenset[int]],
        markup: Markup | None = None,
        whole: bool = False,
    ):
        self.settings, self.read, self.waiting, self.blocks = settings, read, waiting, blocks
        self.markup, self.whole, self.experts = markup, whole, len(blocks)
        counts = torch.zeros(self.experts, dtype=torch.float64)
        for members in read.values():
            counts[list(members)] += 1
        self.shares = (1 / counts).float()
        """[experts]: what one module counts in the mean over an expert's read modules."""
        self.readers: dict[str, _Reader] = {}
        """The read modules by their paths."""
        self._summed_plain: Tensor | None = None
        self._least_of_all: Tensor | None = None

    @classmethod
    def of(cls, settings: Gander, setup: Setup) -> Reading:
        """Chooses the modules to read. Raises RoutingError, naming the expert, where the pool can't be routed so."""
        places = setup.places
        if not places:
            raise RoutingError("Gander must know the order of the modules: attach it with route().")
        stack = "encoder" if "encoder" in setup.stacks else "decoder"
        of_each = [_blocks(expert, places, stack) for expert in setup.experts]
        blocks = sorted(frozenset[int]().union(*of_each))
        if not blocks:
            raise RoutingError(
                f"the pool adapts no numbered block of the {stack}, so Gander has nothing to read."
            )
        most = len(blocks) - 1
        count = _count_read(settings, len(blocks))
        if count > most:
            raise RoutingError(
                f"Gander would read {count} of the {len(blocks)} blocks that the pool adapts, and at least one must be "
                "left to act: set layers lower, or choose a router that decides in every module."
            )
        first = blocks[:count]
        read: dict[str, list[int]] = {}
        for number, expert in enumerate(setup.experts):
            cls._check_acts(expert, places, stack, first)
            for block in first:
                if (path := _module_to_read(expert, places, stack, block)) is not None:
                    read.setdefault(path, []).append(number)
            if not any(number in members for members in read.values()):
                raise RoutingError(
                    f"expert {expert.name!r} adapts no module of the {count} blocks that Gander reads, so it could "
                    "never be chosen: set layers higher, or choose another router."
                )
        waiting = frozenset(
            path for path, place in places.items() if place.stack == stack and place.block in first
        )
        members = {path: tuple(found) for path, found in read.items()}
        markup = None if setup.markup is None else setup.markup()
        return cls(settings, members, waiting, of_each, markup, stack == "encoder")

    def check_on(self, on: Tensor) -> None:
        """Raises RoutingError if a pool of the experts that are on, bool [rows, experts], would be read elsewhere."""
        if on.ndim != 2 or on.shape[1] != len(self.blocks):
            return  # such a table is refused when it is used
        whole = self._first(range(self.experts))
        for row in on.unique(dim=0).tolist():
            left = self._first(number for number, is_on in enumerate(row) if is_on)
            if left and left != whole:
                raise RoutingError(
                    f"without the experts that are switched off, Gander would read other blocks: {left}, not {whole}. "
                    "Make a pool without them instead."
                )

    def _first(self, experts: Iterable[int]) -> list[int]:
        """The blocks that are read in a pool of these experts."""
        blocks = sorted(frozenset[int]().union(*(self.blocks[expert] for expert in experts)))
        return blocks[: _count_read(self.settings, len(blocks))]

    @staticmethod
    def _check_acts(expert: Expert, places: Mapping[str, Place], stack: str, read: Sequence[int]) -> None:
        """Raises RoutingError if what an expert adapts runs before Gander has decided."""
        for path, (_, _, embedding) in expert.sizes.items():
            if embedding:
                raise RoutingError(
                    f"expert {expert.name!r} adapts the embedding {path}, which runs before Gander has read anything: "
                    "choose another router, or make a pool without it."
                )
        if all(places[p].stack == stack and places[p].block in read for p in expert.sizes):
            raise RoutingError(
                f"expert {expert.name!r} adapts only blocks that Gander reads, where the base acts: set layers lower, "
                "or choose another router."
            )

    def bind(self, candidates: Candidates) -> BoundRouter:
        if (members := self.read.get(candidates.path)) is not None:
            self.readers[candidates.path] = reader = _Reader(self, candidates, members)
            return reader
        return _Waiting() if candidates.path in self.waiting else _Follower(self, candidates)

    def evidence(self, memory: PassMemory) -> Tensor:
        """L of the pass's tokens, float32 [B, T, experts]; of an encoder's pass [B, 1, experts]. −∞ before the text.

        Raises:
            RoutingError: a module that is read hasn't run, or the sequences can't be told apart.
        """
        if memory.after is None:
            memory.after = self._summed(memory)
        evidence, state = memory.after[..., : self.experts], memory.after[..., self.experts :]
        return evidence.where(state[..., 1:] == BEGUN, -torch.inf)

    def in_doubt(self, memory: PassMemory, evidence: Tensor, on: Tensor | None) -> Tensor:
        """bool [B, T or 1, 1]: where none of the experts with finite evidence [B, T or 1, experts] stands out.

        on: which experts are on, bool [rows, experts], each row of so many sequences of the batch; None: all.
        """
        assert memory.after is not None
        count = memory.after[..., self.experts : self.experts + 1]
        least = self.least(on).to(evidence.device)
        return _contrast(evidence, count) <= least.repeat_interleave(len(evidence) // len(least), dim=0)

    def least(self, on: Tensor | None) -> Tensor:
        """How far an expert must stand out, float32 [rows, 1, 1], in a pool of those that are on."""
        if on is not None:
            return self._least_of(on)
        if self._least_of_all is None:
            self._least_of_all = self._least_of(torch.ones(1, self.experts, dtype=torch.bool))
        return self._least_of_all

    def _least_of(self, on: Tensor) -> Tensor:
        summed = self._plain_summed()
        evidence = summed[:, :-1].masked_fill(~on.to(summed.device)[:, None], -torch.inf)
        found = _contrast(evidence, summed[:, -1:])
        return found.quantile(1 - CROSSED, dim=1, keepdim=True, interpolation="higher")

    def _plain_summed(self) -> Tensor:
        """L of each plain passage, and behind it the sum of as many ones, float32 [passages, experts + 1]."""
        with _LOCK:
            if self._summed_plain is None:
                self._summed_plain = self._sum_plain()
            return self._summed_plain

    def _sum_plain(self) -> Tensor:
        x = _total(reader.found_in_plain() for reader in self.readers.values())
        text = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return counted(x, text).sum(1) if self.whole else self.scanned(x, text, None)[:, -1].clone()

    def scanned(self, x: Tensor, text: Tensor, before: Tensor | None) -> Tensor:
        """L, and behind it the sum of as many ones, float32 [B, T, experts + 1]."""
        return scan(counted(x, text), text, before, 2 ** (-1 / self.settings.half_life))

    def _summed(self, memory: PassMemory) -> Tensor:
        notes = memory.notes
        if late := next((path for path in self.read if (self, path) not in notes), None):
            raise RoutingError(
                f"{late}, which Gander reads, hasn't run before the blocks that act: this model runs its blocks in "
                "another order than their numbers say. Choose another router."
            )
        tokens = memory.sequences
        tokens.check()
        real, positions = tokens.real, tokens.positions
        x = _total(notes[self, path] for path in self.read)
        text, states = self.text(memory)
        text = text.to(x.device)
        if memory.whole:
            summed, states = counted(x, text).sum(1, keepdim=True), states[:, -1:]
            return torch.cat([summed, states.to(summed)[..., None]], dim=-1)
        if bool(((positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]).any()):
            raise RoutingError(
                "several sequences are packed into one row, whose evidence can't be told apart: give each a row."
            )
        before = memory.previous()
        summed = self.scanned(x, text, None if before is None else before[:, :-1])
        # Behind the experts' evidence and its weight stands where a sequence is that is still before its text.
        return torch.cat([summed, states.to(summed)[..., None]], dim=-1)

    def text(self, memory: PassMemory) -> tuple[Tensor, Tensor]:
        """(which tokens count, bool [B, T]; the state of `markup` after each, int64 [B, T]). Embeddings have no ids, so
        all of them count."""
        real, ids = memory.sequences.real, memory.sequences.ids
        if self.markup is None or ids is None:
            return real, torch.full(real.shape, BEGUN)
        text, after = (self, "text"), (self, "state")
        if text not in memory.notes:
            before = None if memory.whole else memory.previous()
            states = [START] * len(real) if before is None else before[:, -1].long().tolist()
            memory.notes[text], memory.notes[after] = self.markup.read(ids, real, states)
        return memory.notes[text], memory.notes[after]


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape, on the device of the first: a model's blocks may be on several."""
    first, *others = parts
    return torch.stack([first, *(one.to(first.device) for one in others)]).sum(0)


def counted(x: Tensor, text: Tensor) -> Tensor:
    """x [B, T, E] with a 1 behind each token's evidence: what it is summed over. 0 where there is no text, whatever
    the model computes there."""
    return torch.cat([x, x.new_ones(*text.shape, 1)], dim=-1).where(text[..., None], 0.0)


def _contrast(evidence: Tensor, count: Tensor) -> Tensor:
    """max_e S_e − mean_e S_e for S = evidence/count, [..., experts] → [..., 1]; −∞ doesn't count, and 0 is averaged
    too, so that one expert alone can stand out."""
    finite = evidence.isfinite()
    s = evidence.where(finite, 0.0) / count.clamp(min=1e-6)
    mean = s.sum(-1, keepdim=True) / (finite.sum(-1, keepdim=True) + 1)
    return s.where(finite, -torch.inf).amax(-1, keepdim=True) - mean


def scan(x: Tensor, real: Tensor, before: Tensor | None, decay: float) -> Tensor:
    """L_t = γ L_{t−1} + x_t over the real tokens, float32 [B, T, E]; L_t = L_{t−1} at padding.

    Args:
        x: [B, T, E]. real: bool [B, T]. before: L before the first token, [B, E]; None: 0. decay: γ.
    """
    state = x.new_zeros(x.shape[0], x.shape[2]) if before is None else before.to(x)
    if x.shape[1] == 1:  # as when text is generated
        return torch.where(real[..., None], decay * state[:, None] + x, state[:, None])
    parts = []
    for piece, kept in zip(x.split(_SCANNED, dim=1), real.split(_SCANNED, dim=1), strict=True):
        age = kept.cumsum(1)  # [B, t]: how many real tokens there were up to each
        since = (age[:, :, None] - age[:, None, :]).clamp(min=0)
        weights = torch.tril(decay ** since.to(x.dtype)) * kept[:, None, :]
        part = weights @ piece + (decay ** age.to(x.dtype))[..., None] * state[:, None, :]
        state = part[:, -1]
        parts.append(part)
    return torch.cat(parts, dim=1) if parts else x


class _Reader(BoundRouter):
    """At a module that is read: the base acts."""

    needs_reference = True
    needs_plain = True
    acts = False
    whole_passes = True
    plain: Tensor | None = None
    """What plain text gave before it was standardised, float32 [passages, T, members], if the router doubts."""

    def __init__(self, reading: Reading, candidates: Candidates, members: Sequence[int]):
        self.reading, self.path = reading, candidates.path
        self.members, self.candidates = torch.tensor(members), torch.tensor(candidates.members)
        self.shares = reading.shares[list(members)]
        places = [candidates.members.index(member) for member in members]
        updates = tuple(candidates.updates[i] for i in places)
        gates = tuple(_gate_to_read(candidates, i) for i in places)
        read = replace(candidates, members=tuple(members), gates=gates, updates=updates)
        self.calibrated = Calibrated(read, gates, 1, "Gander", narrow=True)

    def observe(self, u: Tensor, ops: Backend) -> None:
        self.calibrated.observe(u, ops)

    def observe_plain(self, u: Tensor, ops: Backend) -> None:
        flat = u.flatten(0, 1)
        self.calibrated.whiten(flat)
        if self.reading.settings.doubt:
            self.plain = self.calibrated.uncalibrated(flat, ops).reshape(*u.shape[:2], -1)

    def found_in_plain(self) -> Tensor:
        """What it adds to x on plain text, float32 [passages, T, experts]."""
        if self.plain is None:
            raise RoutingError("Gander was not shown plain text, by which it doubts: attach it with route().")
        found, shape = self._shared(self.calibrated.on_scale(self.plain.flatten(0, 1))), self.plain.shape[:2]
        self.plain = None
        return found.reshape(*shape, -1)

    def check_observed(self) -> None:
        self.calibrated.check_observed()

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        context.check_whole()
        self.in_whole_pass(u, context.memory(), ops)
        return _nobody(u)

    def in_whole_pass(self, u: Tensor, memory: PassMemory, ops: Backend) -> None:
        part = self._part(u, ops)
        memory.notes[self.reading, self.path] = part.reshape(*memory.sequences.real.shape, -1)

    def _part(self, u: Tensor, ops: Backend) -> Tensor:
        """What this module adds to x, float32 [tokens, experts]."""
        return self._shared(self.calibrated.standardised(u.reshape(-1, u.shape[-1]), ops))

    def _shared(self, z: Tensor) -> Tensor:
        """z of the members [tokens, members] → their part of x, [tokens, experts]."""
        experts, part = self.reading.experts, z * self.shares.to(z.device)
        if len(self.members) == experts:
            return part
        return z.new_zeros(len(z), experts).index_copy(1, self.members.to(z.device), part)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        """What the tokens add to L here, for each candidate."""
        memory = context.memory()
        text, _ = self.reading.text(memory)
        found = memory.notes[self.reading, self.path]
        found = found.where(text.to(found.device)[..., None], 0.0)
        return found.flatten(0, 1)[:, self.candidates.to(found.device)]


class _Waiting(BoundRouter):
    """At a module that runs before all evidence is there, and isn't read: the base acts."""

    acts = False
    whole_passes = True

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        return _nobody(u)

    def in_whole_pass(self, u: Tensor, memory: PassMemory, ops: Backend) -> None:
        return None


class _Follower(ByScores):
    """At a module behind those that are read: the experts with the most evidence act, of the whole pool."""

    of_whole_pool = True
    whole_passes = True

    def __init__(self, reading: Reading, candidates: Candidates):
        super().__init__(min(reading.settings.top_k, reading.experts))
        self.reading, self.path = reading, candidates.path
        self.members = torch.tensor(candidates.members)
        self.by_expert = torch.cat([candidates.by_expert(), torch.tensor([-1])])
        self.key = reading, candidates.members

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        memory = context.memory()
        experts, weights = self._choice(memory, context.on, ops)
        # −1, nobody, finds the last entry.
        here = context.spread(self.by_expert.to(experts.device)[experts]).to(u.device)
        return here, context.spread(weights).to(u.device)

    def in_whole_pass(self, u: Tensor, memory: PassMemory, ops: Backend) -> Choice:
        if (known := memory.choices.get(self.key)) is None:
            experts, weights = self._choice(memory, None, ops)
            shape = (*memory.sequences.real.shape, self.top_k)
            here = self.by_expert.to(experts.device)[experts]
            here, weights = (x.expand(shape).reshape(-1, self.top_k) for x in (here, weights))
            known = memory.choices[self.key] = Choice(here, weights)
        return known

    def _choice(self, memory: PassMemory, on: Tensor | None, ops: Backend) -> tuple[Tensor, Tensor]:
        """The experts and their weights for the pass's tokens, each [B, T or 1, k]; computed once a pass."""
        chosen, weights = (self.reading, "chosen"), (self.reading, "weights")
        if chosen not in memory.notes:
            evidence = self._of_those_on(memory, on)
            shape = (*evidence.shape[:2], self.top_k)
            experts, shares = ops.choose(evidence.flatten(0, 1), self.top_k)
            none = evidence.flatten(0, 1).gather(1, experts) == -torch.inf
            memory.notes[chosen] = experts.masked_fill(none, -1).reshape(shape)
            shares = shares.masked_fill(none, 0.0).where(~none.all(1, keepdim=True), 1 / self.top_k)
            memory.notes[weights] = shares.reshape(shape)
        return memory.notes[chosen], memory.notes[weights]

    def check_on(self, on: Tensor) -> None:
        self.reading.check_on(on)

    def scores(self, u: Tensor, context: RoutingContext, ops: Backend) -> Tensor:
        found = self._of_those_on(context.memory(), context.on)
        return context.spread(found[..., self.members.to(found.device)]).to(u.device)

    def _of_those_on(self, memory: PassMemory, on: Tensor | None) -> Tensor:
        """L as `Reading.evidence`, −∞ for experts that are switched off, and for all in doubt."""
        evidence = self.reading.evidence(memory)
        if on is not None:
            self.reading.check_on(on)
            if len(evidence) % len(on):
                raise RoutingError(
                    f"{len(on)} rows of switches don't fit a batch of {len(evidence)} sequences."
                )
            mine = on.to(evidence.device).repeat_interleave(len(evidence) // len(on), dim=0)
            evidence = evidence.masked_fill(~mine[:, None], -torch.inf)
        if self.reading.settings.doubt:
            evidence = evidence.masked_fill(self.reading.in_doubt(memory, evidence, on), -torch.inf)
        return evidence


def _nobody(u: Tensor) -> tuple[Tensor, Tensor]:
    """No expert, for each of u's tokens: the base has all of the weight."""
    chosen = torch.full((len(u), 1), -1, dtype=torch.int64, device=u.device)
    return chosen, torch.ones(chosen.shape, dtype=torch.float32, device=u.device)


def _gate_to_read(candidates: Candidates, index: int) -> Tensor | None:
    """A candidate's gate, standardised, where it stands for weights that have no singular vectors; else None."""
    update, gate = candidates.updates[index], candidates.gates[index]
    if update is None or gate is None or why_no_signature(update) is None:
        return None
    return standardised_gate(gate)


def _module_to_read(expert: Expert, places: Mapping[str, Place], stack: str, block: int) -> str | None:
    """The module of a block at which an expert is read: its projection to values, else the first that it adapts."""
    found = [path for path in expert.sizes if (place := places[path]).stack == stack and place.block == block]
    values = (path for path in found if path.rsplit(".", 1)[-1] in _VALUES)
    return next(values, found[0] if found else None)


def _count_read(settings: Gander, blocks: int) -> int:
    """How many of so many blocks are read."""
    return settings.layers or max(1, -(-blocks // BLOCKS_PER_READ))


def _blocks(expert: Expert, places: Mapping[str, Place], stack: str) -> frozenset[int]:
    """The numbers of the blocks that an expert adapts in a stack."""
    found = (places[path] for path in expert.sizes)
    return frozenset(place.block for place in found if place.stack == stack and place.block is not None)
