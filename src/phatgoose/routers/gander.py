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
from phatgoose.ops.reference import standardise
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
    check_bool,
    signed,
)
from phatgoose.routers.weights import Calibrated, discriminants, standardised_gate

BLOCKS_PER_READ = 6
"""One in so many of the adapted blocks is read, unless `layers` says otherwise."""
CROSSED = 0.05
"""The share of plain passages on which an expert stands out, if `doubt` is on."""
_SCANNED = 128
"""Tokens whose evidence is summed at a time."""
_PASSAGES = 8
"""Passages of plain text that are scored at a time."""
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
    standardised on the reference text. For an expert without singular vectors it is z of its gate. With `means`, it is
    the mean of that and of z(q_eᵀū_t), q_e the direction in which the expert's own prompts differ most from plain text,
    by their means (`discriminants`). x is summed with a forgetting window:

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
    means: bool = False
    """Whether the mean prompts that contributors publish (`phatgoose signature`) are evidence, as much as weights."""
    doubt: bool = False
    """Whether the base acts where no expert stands out: where max_e S_{t,e} − mean_e S_{t,e} isn't above what one in
    twenty passages of plain text pass, S being the evidence per token, with a 0 among those averaged."""
    directions: int | None = None
    """How many of an expert's directions are compared with what is read: at most so many, those that its update
    stretches most. None: all. Reading a pool of thousands costs as much as all of their directions."""

    paper = "ours"
    needs = "LoRA weights (or gates), one pass of the base; with means=true data signatures: prompts"
    chooses = "top_k experts for all that was read so far"
    remembers = True
    by_token = False

    def __post_init__(self) -> None:
        check_at_least(self, half_life=1, top_k=1)
        check_bool(self, "doubt", "means")
        for name in ("layers", "directions"):
            if getattr(self, name) is not None:
                check_at_least(self, **{name: 1})
        if self.means:
            object.__setattr__(self, "reads", "prompts")

    def prepared(self, setup: Setup) -> Router:
        return PreparedRouter(self, Reading.of(self, setup).bind)

    def bind(self, candidates: Candidates) -> BoundRouter:
        raise RoutingError("Gander looks at the whole pool first: attach it with route().")


class Reading:
    """Which modules are read for which expert, and what they have found in a pass.

    Args:
        read: module path → the experts, by number, whose evidence is taken there.
        waiting: modules that act as the base, since they run before all evidence is there.
        blocks: numbers of blocks of the stack that is read, and the experts that adapt just these. Every expert once.
        markup: tells where a sequence's text begins. None: with its first token.
        whole: whether it is an encoder that is read, which has the whole text before it.
        prompts: of each expert, the mean prompts by module path, if they are evidence.
    """

    def __init__(
        self,
        settings: Gander,
        read: Mapping[str, tuple[int, ...]],
        waiting: frozenset[str],
        blocks: Sequence[tuple[frozenset[int], Sequence[int]]],
        markup: Markup | None = None,
        whole: bool = False,
        prompts: Sequence[Mapping[str, Tensor]] | None = None,
    ):
        self.prompts = prompts
        self.settings, self.read, self.waiting = settings, read, waiting
        self.markup, self.whole, self.experts = markup, whole, sum(len(members) for _, members in blocks)
        self.decay = 2 ** (-1 / settings.half_life)
        self.blocks = [numbers for numbers, _ in blocks]
        self.kinds = torch.zeros(self.experts, dtype=torch.int64)
        """int64 [experts]: which of `blocks` each adapts."""
        for kind, (_, members) in enumerate(blocks):
            self.kinds[list(members)] = kind
        counts = torch.zeros(self.experts, dtype=torch.float64)
        for members in read.values():
            counts[list(members)] += 1
        self.shares = (1 / counts).float()
        """[experts]: what one module counts in the mean over an expert's read modules."""
        self.readers: dict[str, _Reader] = {}
        """The read modules by their paths."""
        self._places: dict[tuple[int, ...], _Places] = {}
        self._summed_plain: Tensor | None = None
        self._least_of_all: Tensor | None = None

    @classmethod
    def of(cls, settings: Gander, setup: Setup) -> Reading:
        """Chooses the modules to read. Raises RoutingError, naming the expert, where the pool can't be routed so."""
        places = setup.places
        if not places:
            raise RoutingError("Gander must know the order of the modules: attach it with route().")
        stack = "encoder" if "encoder" in setup.stacks else "decoder"
        alike: dict[tuple[str, ...], list[int]] = {}
        for number, expert in enumerate(setup.experts):
            alike.setdefault(tuple(expert.sizes), []).append(number)
        # Whatever is asked of an expert here depends on which modules it adapts.
        kinds = [(setup.experts[members[0]], members) for members in alike.values()]
        of_kinds = [(_blocks(expert, places, stack), members) for expert, members in kinds]
        blocks = sorted(frozenset[int]().union(*(numbers for numbers, _ in of_kinds)))
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
        for expert, members in kinds:
            cls._check_acts(expert, places, stack, first)
            found = [path for block in first if (path := _module_to_read(expert, places, stack, block))]
            for path in found:
                read.setdefault(path, []).extend(members)
            if not found:
                raise RoutingError(
                    f"expert {expert.name!r} adapts no module of the {count} blocks that Gander reads, so it could "
                    "never be chosen: set layers higher, or choose another router."
                )
        waiting = frozenset(
            path for path, place in places.items() if place.stack == stack and place.block in first
        )
        in_order = {path: tuple(sorted(members)) for path, members in read.items()}
        markup = None if setup.markup is None else setup.markup()
        prompts = _prompts(settings, setup, in_order) if settings.means else None
        return cls(settings, in_order, waiting, of_kinds, markup, stack == "encoder", prompts)

    def check_on(self, on: Tensor) -> None:
        """Raises RoutingError if a pool of the experts that are on, bool [rows, experts], would be read elsewhere."""
        if on.ndim != 2 or on.shape[1] != self.experts:
            return  # such a table is refused when it is used
        if len(self.blocks) == 1:
            return
        there = torch.zeros(len(on), len(self.blocks)).index_add_(1, self.kinds, on.cpu().float()) > 0
        whole = self._first(range(len(self.blocks)))
        for row in there.unique(dim=0).tolist():
            left = self._first(kind for kind, is_there in enumerate(row) if is_there)
            if left and left != whole:
                raise RoutingError(
                    f"without the experts that are switched off, Gander would read other blocks: {left}, not {whole}. "
                    "Make a pool without them instead."
                )

    def _first(self, kinds: Iterable[int]) -> list[int]:
        """The blocks that are read in a pool of experts of these kinds."""
        blocks = sorted(frozenset[int]().union(*(self.blocks[kind] for kind in kinds)))
        return blocks[: _count_read(self.settings, len(blocks))]

    def places(self, candidates: Candidates) -> _Places:
        """The experts at a module; the same object for all modules that have the same candidates."""
        if (found := self._places.get(candidates.members)) is None:
            found = self._places[candidates.members] = _Places.of(candidates)
        return found

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

    def release(self) -> None:
        """Lets go of experts' updates and mean prompts, which only observing text needs."""
        self.prompts = None
        for reader in self.readers.values():
            reader.read = replace(reader.read, gates=(), updates=())

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
                found = _total([reader.found_in_plain() for reader in self.readers.values()])
                count = found.new_tensor(next(iter(self.readers.values())).plain_weight)
                self._summed_plain = torch.cat([found * count, count.expand(len(found), 1)], dim=-1)
            return self._summed_plain

    def ages(self, length: int) -> Tensor:
        """What each of so many tokens counts in L after the last of them, float32 [length]."""
        ages = torch.arange(length - 1, -1, -1, dtype=torch.float32)
        return torch.ones(length) if self.whole else self.decay**ages

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
        # Each is as large as what they add up to, so they are let go.
        x = _total([notes.pop((self, path)) for path in self.read])
        text, states = self.text(memory)
        text = text.to(x.device)[..., None]
        # 0 where there is no text, whatever the model computes there.
        x, ones = x.where(text, 0.0), text.to(x.dtype)
        # Behind the experts' evidence stands how many tokens it is of, and last where a sequence is before its text.
        parts = [slice(self.experts), slice(self.experts, self.experts + 1)]
        length = 1 if memory.whole else x.shape[1]
        found = x.new_empty(len(x), length, self.experts + 2)
        found[..., -1] = states[:, -length:]
        if memory.whole:
            for part, one in zip(parts, (x, ones), strict=True):
                found[..., part] = one.sum(1, keepdim=True)
            return found
        if length > 1 and bool(((positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]).any()):
            raise RoutingError(
                "several sequences are packed into one row, whose evidence can't be told apart: give each a row."
            )
        before = memory.previous()
        for part, one in zip(parts, (x, ones), strict=True):
            found[..., part] = scan(
                one, text[..., 0], None if before is None else before[:, part], self.decay
            )
        return found

    def text(self, memory: PassMemory) -> tuple[Tensor, Tensor]:
        """(which tokens count, bool [B, T]; the state of `markup` after each, int64 [B, T]). Embeddings have no ids, so
        all of them count."""
        real, ids = memory.sequences.real, memory.sequences.ids
        if self.markup is None or ids is None:
            return real, torch.full_like(real, BEGUN, dtype=torch.int64)
        text, after = (self, "text"), (self, "state")
        if text not in memory.notes:
            before = None if memory.whole else memory.previous()
            states = (
                ids.new_full((len(ids),), START) if before is None else before[:, -1].to(ids.device).long()
            )
            memory.notes[text], memory.notes[after] = self.markup.read(ids, real.to(ids.device), states)
        return memory.notes[text], memory.notes[after]


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, on the device of the first: a model's blocks may be on several."""
    first, *others = parts
    total = first + others[0].to(first.device) if others else first
    for one in others[1:]:
        total += one.to(first.device)
    return total


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
    found = torch.empty_like(x)
    for start in range(0, x.shape[1], _SCANNED):
        some = slice(start, start + _SCANNED)
        age = real[:, some].cumsum(1)  # [B, t]: how many real tokens there were up to each
        since = (age[:, :, None] - age[:, None, :]).clamp(min=0)
        weights = torch.tril(decay ** since.to(x.dtype)) * real[:, None, some]
        part = weights @ x[:, some]
        part += (decay ** age.to(x.dtype))[..., None] * state[:, None, :]
        found[:, some], state = part, part[:, -1]
    return found


@dataclass(eq=False)
class _Places:
    """Where the pool's experts are among the candidates of a module."""

    members: Tensor
    """int64 [candidates]: the expert that each is."""
    by_expert: Tensor
    """int64 [experts + 1]: the candidate that each is, −1 where it is none; −1, nobody, finds the last entry."""

    @classmethod
    def of(cls, candidates: Candidates) -> _Places:
        return cls(torch.tensor(candidates.members), torch.cat([candidates.by_expert(), torch.tensor([-1])]))

    def here(self, experts: Tensor) -> Tensor:
        """The candidates that these experts are, of any shape."""
        if self.by_expert.device != experts.device:
            self.by_expert = self.by_expert.to(experts.device)
        return self.by_expert[experts]


class _Reader(BoundRouter):
    """At a module that is read: the base acts."""

    needs_reference = True
    needs_plain = True
    acts = False
    whole_passes = True
    plain: Tensor | None = None
    """What plain text gave before it was standardised, float32 [kinds of evidence, passages, members], if the router
    doubts: the mean over a passage's tokens, each as it counts in L."""
    plain_weight = 0.0
    """What a passage's tokens count together."""

    def __init__(self, reading: Reading, candidates: Candidates, members: Sequence[int]):
        self.reading, self.path = reading, candidates.path
        self.members, self.candidates = torch.tensor(members), reading.places(candidates).members
        self.shares = reading.shares[self.members]
        where = {member: place for place, member in enumerate(candidates.members)}
        places = [where[member] for member in members]
        updates = tuple(candidates.updates[i] for i in places)
        gates = tuple(_gate_to_read(candidates, i) for i in places)
        self.read = replace(candidates, members=tuple(members), gates=gates, updates=updates)
        directions = reading.settings.directions
        self.evidence = [Calibrated(self.read, gates, 1, "Gander", narrow=True, directions=directions)]
        """What is known of the experts: their weights, and their mean prompts."""

    def observe(self, u: Tensor, ops: Backend) -> None:
        for one in self.evidence:
            one.observe(u, ops)

    def observe_plain(self, u: Tensor, ops: Backend) -> None:
        flat = u.flatten(0, 1)
        self.evidence[0].whiten(flat)
        if (prompts := self.reading.prompts) is not None:
            means = torch.stack([prompts[member][self.path] for member in self.read.members])
            # z is the same for q and for q standardised.
            gates = standardised_gate(discriminants(means, standardise(flat).cpu()))
            self.evidence[1:] = [Calibrated(self.read, gates.unbind(), 1, "Gander")]
        if self.reading.settings.doubt:
            ages = self.reading.ages(u.shape[1])
            self.plain_weight = float(ages.sum())
            weights = (ages / ages.sum()).to(u.device)
            self.plain = torch.stack([self._plain(one, u, weights, ops) for one in self.evidence])

    @staticmethod
    def _plain(evidence: Calibrated, u: Tensor, weights: Tensor, ops: Backend) -> Tensor:
        """`plain` of inputs [passages, T, d] by one kind of evidence, [passages, members]."""
        found = []
        for some in u.split(_PASSAGES):
            t = evidence.uncalibrated(some.flatten(0, 1), ops).float().unflatten(0, some.shape[:2])
            found.append(torch.einsum("pte,t->pe", t, weights))
        return torch.cat(found)

    def found_in_plain(self) -> Tensor:
        """What it adds to x on plain text, the mean over a passage's tokens, float32 [passages, experts]."""
        if self.plain is None:
            raise RoutingError("Gander was not shown plain text, by which it doubts: attach it with route().")
        found = [one.on_scale(t) for one, t in zip(self.evidence, self.plain, strict=True)]
        self.plain = None
        return self._shared(found)

    def check_observed(self) -> None:
        self.evidence[0].check_observed()

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        context.check_whole()
        self.in_whole_pass(u, context.memory(), ops)
        return _nobody(u)

    def in_whole_pass(self, u: Tensor, memory: PassMemory, ops: Backend) -> None:
        part = self._part(u, ops)
        memory.notes[self.reading, self.path] = part.reshape(*memory.sequences.real.shape, -1)

    def _part(self, u: Tensor, ops: Backend) -> Tensor:
        """What this module adds to x, float32 [tokens, experts]."""
        flat = u.reshape(-1, u.shape[-1])
        return self._shared([one.standardised(flat, ops) for one in self.evidence])

    def _shared(self, kinds: Sequence[Tensor]) -> Tensor:
        """z of the members by each kind of evidence [tokens, members] → their part of x, [tokens, experts]."""
        z = kinds[0] if len(kinds) == 1 else torch.stack(list(kinds)).mean(0)
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
        self.reading, self.places = reading, reading.places(candidates)

    def __call__(self, u: Tensor, context: RoutingContext, ops: Backend) -> tuple[Tensor, Tensor]:
        memory = context.memory()
        experts, weights = self._choice(memory, context.on, ops)
        here = context.spread(self.places.here(experts)).to(u.device)
        return here, context.spread(weights).to(u.device)

    def in_whole_pass(self, u: Tensor, memory: PassMemory, ops: Backend) -> Choice:
        if (known := memory.choices.get(self.places)) is None:
            experts, weights = self._choice(memory, None, ops)
            shape = (*memory.sequences.real.shape, self.top_k)
            here = self.places.here(experts)
            here, weights = (x.expand(shape).reshape(-1, self.top_k) for x in (here, weights))
            known = memory.choices[self.places] = Choice(here, weights)
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
        return context.spread(found[..., self.places.members.to(found.device)]).to(u.device)

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


def _prompts(
    settings: Gander, setup: Setup, read: Mapping[str, tuple[int, ...]]
) -> list[Mapping[str, Tensor]]:
    """The mean prompts of each expert. Raises RoutingError for one that lacks that of a module where it is read."""
    found: list[Mapping[str, Tensor]] = signed(settings, setup)
    for path, members in read.items():
        for member in members:
            if path not in found[member]:
                raise RoutingError(
                    f"expert {setup.experts[member].name!r} has no mean prompts of {path}, where Gander reads it: make "
                    "its signature anew (`phatgoose signature`), or leave means out."
                )
    return found


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
