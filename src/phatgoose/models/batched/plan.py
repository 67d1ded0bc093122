"""Which route each token of a pass takes, and what its router may know of it.

The tokens of a pass belong to items: rows of a batch, or sequences packed one after the other into one row. A
`BatchPlan` gives every item a route; None is the base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.models.context.streams import Streams
from phatgoose.routers.context import PassMemory, RoutingContext, Sequences, Texts

TextSoFar = tuple[tuple[int, ...], tuple[int, ...]]
"""An item's prompt, and what stood behind it before this pass."""
_NO_ITEMS_FAULT = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))


@dataclass(eq=False)
class SequenceMemory:
    """What a route's router keeps of one sequence between two passes. Whoever runs the passes keeps it."""

    tokens: int = 0
    """After how many tokens of the sequence."""
    state: Tensor | None = None
    """As `PassMemory.after` of the last of them, […]."""


@dataclass(eq=False)
class Group:
    """Tokens of one forward pass that share a route, or that each use a single expert of one pool version.

    members: the items. rows: into how many rows of equal length the tokens fit; 1 if they don't. index: int64 [n],
    which of the pass's tokens; None: all. items: int64 [n], the item of each token. experts: int64 [n], the single
    expert of each token, None if `route` chooses.
    """

    version: PoolVersion
    route: Route
    members: tuple[int, ...]
    rows: int
    index: Tensor | None
    items: Tensor
    experts: Tensor | None
    texts: dict[tuple[str, int], Texts] = field(default_factory=dict, repr=False)
    """What the items were given to read, by stream and the number of tokens that a module saw."""
    picked_from: tuple[Group, int, Tensor] | None = None
    """What `pick` was given: the group in the whole pass, the pass's number of tokens, and which of them these are."""


@dataclass(eq=False)
class BatchPlan:
    """The routes of a pass."""

    routes: Sequence[Route | None]
    """Of each item; None: the base alone."""
    lengths: Sequence[int] | None = None
    """Packed: how many tokens each item has, one after the other in one row. None: each item is a row."""
    kept: Tensor | None = None
    """Packed: int64, the positions that the last layers are asked for (logits_to_keep), if not all."""
    count_loads: bool = False
    """Whether choices are `noted`, to be summed up once the pass is over."""
    skip: Sequence[int] | None = None
    """How many of each item's first tokens are left out of the loads, since they were counted before."""
    texts: Sequence[TextSoFar] | None = None
    """Of each item, for routes that read text."""
    memories: Sequence[SequenceMemory] | None = None
    """Of each item, for routes that remember. `keep_memories` brings them up to date when the pass is over."""
    failed: dict[int, Exception] | None = None
    """Collects the errors of items, which then fall back to the base. None: errors are raised."""
    noted: dict[tuple[PoolVersion, tuple[int, ...], int], list[tuple[Tensor, Tensor, Tensor]]] = field(
        default_factory=dict, repr=False
    )
    """By version, the pool's expert that each candidate is, and k: the items int64 [n], candidates int64 [n, k] (−1:
    none) and weights [n, k] of modules' choices. Nobody may write into these tensors until they are summed."""
    _items: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _groups: dict[int, list[Group]] = field(default_factory=dict, repr=False)
    _remembered: dict[int, tuple[PassMemory, int]] = field(default_factory=dict, repr=False)
    """Of each item whose route remembers: its group's memory of this pass, and its row there."""

    @property
    def base_only(self) -> bool:
        return all(route is None for route in self.routes)

    def items(self, tokens: int) -> Tensor:
        """int64 [tokens]: the item of each token that a module saw. Raises RoutingError if they can't be matched to the
        items."""
        if tokens not in self._items:
            self._items[tokens] = self._match_items(tokens)
        return self._items[tokens]

    def _match_items(self, tokens: int) -> Tensor:
        n = len(self.routes)
        if self.lengths is None:
            if not n or tokens % n:
                raise RoutingError(
                    f"a module saw {tokens} tokens of a batch of {n} rows: they can't be matched."
                )
            return torch.arange(n).repeat_interleave(tokens // n)
        whole = torch.arange(n).repeat_interleave(torch.tensor(self.lengths))
        if tokens == len(whole):
            return whole
        if self.kept is not None and tokens == len(self.kept):
            return whole[self.kept.cpu()]
        raise RoutingError(
            f"a module saw {tokens} tokens of {len(whole)} packed ones: they can't be matched."
        )

    def groups(self, tokens: int) -> list[Group]:
        """The groups of a module's tokens, for a module that saw this many; the base's tokens are in none."""
        if tokens not in self._groups:
            items = self.items(tokens)
            counts = items.bincount(minlength=len(self.routes)).tolist()
            kept = self._kept_of_each() if self.is_kept_part(tokens) else None
            together: dict[tuple[object, ...], list[int]] = {}
            for item, route in enumerate(self.routes):
                if route is not None and counts[item] and item not in (self.failed or ()):
                    key = self._group_key(item, route, None if kept is None else kept[item])
                    together.setdefault(key, []).append(item)
            self._groups[tokens] = [self._group(members, items, counts) for members in together.values()]
        return self._groups[tokens]

    def _group_key(self, item: int, route: Route, kept: tuple[int, ...] | None) -> tuple[object, ...]:
        """Items with the same key run together. kept: which of an item's tokens the module saw; None: all."""
        # Whatever the expert: it is in a table, and the version's stack has them all.
        if route.single is not None:
            return (id(route.version),)
        # A router that looks at sequences is shown rows of one length, which packed items have only beside others of
        # their length, of which the module saw the same tokens.
        if route.by_sequence and self.lengths is not None:
            return id(route.version), id(route), self.lengths[item], kept
        return id(route.version), id(route)

    def _group(self, members: list[int], items: Tensor, counts: list[int]) -> Group:
        route = self.routes[members[0]]
        assert route is not None
        index, device = None, route.version.base.device
        if sum(counts[i] for i in members) < len(items):
            index = torch.isin(items, torch.tensor(members)).nonzero().squeeze(1)
        own = items if index is None else items[index]
        experts = None
        if route.single is not None:
            table = torch.tensor([-1 if r is None or r.single is None else r.single for r in self.routes])
            experts = table[own].to(device)
        even = self.lengths is None or route.by_sequence
        index = None if index is None else index.to(device)
        return Group(route.version, route, tuple(members), len(members) if even else 1, index, own, experts)

    def pick(self, group: Group, tokens: Tensor, of: int) -> Group | None:
        """Those of a group's tokens that are among `tokens` (int64 [n], of the pass's `of`); None if none is.

        The result's `index` counts within `tokens`.
        """
        own = torch.arange(of) if group.index is None else group.index.cpu()
        place = torch.full((of,), -1).scatter(0, own, torch.arange(len(own)))[tokens.cpu()]
        there = (place >= 0).nonzero().squeeze(1)
        if not len(there):
            return None
        which = place[there]
        return replace(
            group,
            rows=1,
            index=None if len(there) == len(tokens) else there.to(tokens.device),
            items=group.items[which],
            experts=None if group.experts is None else group.experts[which.to(group.experts.device)],
            picked_from=(group, of, which),
        )

    def retries(self, group: Group, error: Exception, tokens: int) -> list[Group]:
        """What to try in place of a group that went wrong: each of its items alone. An item that was alone has failed.

        Raises:
            Exception: as `fail`.
        """
        if len(group.members) == 1:
            self.fail(group, error)
            return []
        self._check_collected(error)
        items = self.items(tokens)
        counts = items.bincount(minlength=len(self.routes)).tolist()
        return [self._group([item], items, counts) for item in group.members]

    def fail(self, group: Group, error: Exception) -> None:
        """Has a group's items fall back to the base for the rest of the pass.

        Raises:
            Exception: `error`, if nobody collects it, or if no item is to blame (memory ran out, or a device failed).
        """
        failed = self._check_collected(error)
        failed |= dict.fromkeys(group.members, error)
        self._groups.clear()

    def _check_collected(self, error: Exception) -> dict[int, Exception]:
        if self.failed is None or isinstance(error, _NO_ITEMS_FAULT):
            raise error
        return self.failed

    def summed_loads(self) -> dict[int, tuple[Tensor, Tensor]]:
        """How much each expert did for each item, over modules and tokens, by version's id: float64 [items, experts],
        the weights summed, and int64 [items], how many choices of k experts that were."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for (version, members, k), noted in self.noted.items():
            items, experts = len(self.routes), len(version.pool)
            if id(version) not in found:
                weight = torch.zeros(items, experts + 1, dtype=torch.float64)
                found[id(version)] = weight, torch.zeros(items, dtype=torch.int64)
            weight, times = found[id(version)]
            owners = torch.cat([of for of, _, _ in noted])
            times.index_add_(0, owners, torch.ones_like(owners))
            if not k:
                continue
            table = torch.tensor([*members, -1])  # −1 finds the last entry: no expert
            acted = table[torch.cat([chosen for _, chosen, _ in noted]).cpu()]
            cell = owners[:, None] * (experts + 1) + torch.where(acted < 0, experts, acted)
            amount = torch.cat([w for _, _, w in noted]).cpu().double()
            weight.view(-1).index_add_(0, cell.reshape(-1), amount.reshape(-1))
        return {version: (weight[:, :-1], times) for version, (weight, times) in found.items()}

    def memory(self, members: Sequence[int], make: Callable[[], PassMemory]) -> PassMemory:
        """The memory of a group of items in this pass. `make` makes it for a group that has none yet."""
        known = [self._remembered[item] for item in members if item in self._remembered]
        if len(known) < len(members):
            found = make()
        else:
            found, rows = known[0][0], [row for _, row in known]
            if rows == list(range(len(found.sequences.real))) and all(one is found for one, _ in known):
                return found
            # Items of several groups, or some of a group: one failed, or the module sees some of the pass's tokens.
            found = _joined(known)
        self._remembered |= {item: (found, row) for row, item in enumerate(members)}
        return found

    def keep_memories(self) -> None:
        """The pass is over: what its items' routers leave goes into `memories`."""
        if self.memories is None:
            return
        ends = {
            memory: [end for _, end in _bounds(memory.sequences)] for memory, _ in self._remembered.values()
        }
        for item, (memory, row) in self._remembered.items():
            if memory.after is not None and item not in (self.failed or ()):
                own = self.memories[item]
                # A copy: a view would keep the whole pass's in memory.
                own.state = memory.after[row, -1].clone()
                if not memory.whole:
                    own.tokens = ends[memory][row] or own.tokens

    def _kept_of_each(self) -> list[tuple[int, ...]]:
        """For each item, which of its tokens are among `kept`."""
        assert self.lengths is not None
        assert self.kept is not None
        found: list[tuple[int, ...]] = [() for _ in self.routes]
        for item, position in zip(
            self.items(len(self.kept)), self._positions()[self.kept.cpu()], strict=True
        ):
            found[item] += (int(position),)
        return found

    def _positions(self) -> Tensor:
        """Packed: int64, the position of each of the pass's tokens among its item's tokens in this pass."""
        assert self.lengths is not None
        return torch.cat([torch.arange(length) for length in self.lengths])

    def is_kept_part(self, tokens: int) -> bool:
        """Whether a module that saw this many tokens saw those at `kept`, and not all."""
        if self.lengths is None or self.kept is None:
            return False
        return tokens == len(self.kept) != sum(self.lengths)

    def positions(self, group: Group, tokens: int) -> Tensor:
        """Packed: int64 [n], the position of each of a group's tokens among its item's tokens in this pass."""
        if group.picked_from is not None:
            whole, of, which = group.picked_from
            return self.positions(whole, of)[which]
        found = self._positions()
        if self.is_kept_part(tokens):
            assert self.kept is not None
            found = found[self.kept.cpu()]
        return found if group.index is None else found[group.index.cpu()]


@dataclass(frozen=True, eq=False, kw_only=True)
class SubsetContext(RoutingContext):
    """What a router may know of a group's tokens: rows of one length if they fit into such, else one row."""

    plan: BatchPlan
    group: Group
    call: RoutingContext
    """The module's whole call."""
    streams: Streams

    @staticmethod
    def of(plan: BatchPlan, group: Group, call: RoutingContext, streams: Streams) -> SubsetContext:
        n, tokens = len(group.items), call.rows * call.length
        # Which tokens of each item the module saw, if not all. They are the same for every item of the group.
        kept = call.kept if plan.lengths is None else None
        if plan.is_kept_part(tokens) and group.route.by_sequence:
            kept = plan.positions(group, tokens)[: n // len(group.members)]
        return SubsetContext(
            call.path, group.rows, n // group.rows, None, kept=kept,
            stream=call.stream, problem=call.problem, by_row=call.by_row,
            plan=plan, group=group, call=call, streams=streams,
        )  # fmt: skip

    def tokens(self) -> Sequences:
        """The sequences matched to the group's tokens, [1, n]. Raises RoutingError if the model was called in a way
        that hides them."""
        group, seen = self.group, self.call.tokens()

        def subset(x: Tensor) -> Tensor:
            flat = x.reshape(-1)
            return (flat if group.index is None else flat[group.index])[None]

        ids = None if seen.ids is None else subset(seen.ids)
        return Sequences(ids, subset(seen.positions), subset(seen.real), seen.past)

    def check_whole(self) -> None:
        self.call.check_whole()

    def memory(self) -> PassMemory:
        """What is known of the group's items from passes before; the same object for every module that sees the pass.
        Raises RoutingError if the plan doesn't say."""
        if self.plan.memories is None or self.call.sequences is None:
            raise RoutingError(f"what module {self.path} has read before is unknown.")
        return self.plan.memory(self.group.members, self._make_memory)

    def _make_memory(self) -> PassMemory:
        plan, seen, members = self.plan, self.call.sequences, self.group.members
        assert plan.memories is not None
        assert seen is not None
        seen.check()
        own, where = [plan.memories[item] for item in members], self._where()
        ids = None if seen.ids is None else seen.ids[where]
        sequences = Sequences(ids, seen.positions[where], seen.real[where], seen.past)
        if "encoder" not in self.streams.stacks:
            # Read now: an item without them fails here, where the others can still be tried without it.
            states = _states(own, sequences)
            return PassMemory(sequences, lambda: states)
        after = None
        if self.streams.stack_of(self.path) == "decoder":
            after = torch.stack([_known(one.state) for one in own])[:, None]
        return PassMemory(sequences, lambda: None, True, after)

    def _where(self) -> tuple[Any, ...]:
        """Indices of the group's items among the pass's sequences, one item a row."""
        lengths, members = self.plan.lengths, self.group.members
        if lengths is None:
            return (torch.tensor(members),)
        starts = torch.tensor([0, *lengths]).cumsum(0)[list(members)]
        return (0, starts[:, None] + torch.arange(lengths[members[0]]))

    def texts(self) -> Texts:
        """What the group's items were given to read; the same object for every module that sees the pass. Raises
        RoutingError if the plan doesn't say."""
        plan, group, call = self.plan, self.group, self.call
        seen, key = call.sequences, (call.stream, call.rows * call.length)
        if key not in group.texts:
            if plan.texts is None or seen is None:
                raise RoutingError(f"the text that module {self.path} works on is unknown.")
            seen.check()
            group.texts[key] = self._read_texts(plan.texts, seen)
        return group.texts[key]

    def _read_texts(self, whole: Sequence[TextSoFar], seen: Sequences) -> Texts:
        """The `Texts` of the group's items, one a row."""
        members, where = self.group.members, self._where()
        prompts, written = zip(*(whole[item] for item in members), strict=True)
        ids, real = None if seen.ids is None else seen.ids.cpu()[where], seen.real.cpu()[where]
        if self.stream == "encoder":
            return Texts(prompts, torch.zeros_like(real), ids, ((),) * len(members))
        if "encoder" in self.streams.stacks:
            return Texts(prompts, real, ids, written, apart=True)
        read = torch.tensor([len(prompt) for prompt in prompts])
        return Texts(prompts, real & (seen.positions.cpu()[where] >= read[:, None]), ids, written)

    def note(self, chosen: Tensor, weights: Tensor) -> None:
        """Notes the group's choice at this module for the plan's loads; padding isn't counted."""
        plan, group, call = self.plan, self.group, self.call
        items = group.items
        if plan.skip is not None and plan.lengths is not None and any(plan.skip):
            new = plan.positions(group, call.rows * call.length) >= torch.tensor(plan.skip)[items]
            items, chosen, weights = items[new], chosen[new], weights[new]
        elif plan.lengths is None and not (counted := self._counted()).all():
            items, chosen, weights = items[counted], chosen[counted], weights[counted]
        members = group.version.sites[self.path].members
        key = group.version, members, chosen.shape[1]
        plan.noted.setdefault(key, []).append((items, chosen, weights))

    def _counted(self) -> Tensor:
        """bool [n], on the CPU: which of the group's tokens are real, and seen for the first time."""
        group, call = self.group, self.call
        counted = torch.zeros(call.rows, call.length, dtype=torch.bool)
        counted[:, call.again :] = call.new().tokens().real.reshape(call.rows, -1).cpu()
        return counted.flatten() if group.index is None else counted.flatten()[group.index.cpu()]


def _states(memories: Sequence[SequenceMemory], sequences: Sequences) -> Tensor | None:
    """What the sequences' routers left before a pass, [B, …]; None if all of them begin, or begin again.

    Raises:
        RoutingError: a sequence goes on from tokens that the router hasn't read.
    """
    states: list[Tensor | None] = []
    for one, (start, end) in zip(memories, _bounds(sequences), strict=True):
        if not end:  # it has no part in this pass
            states.append(one.state)
        else:
            states.append(_known(one.state if start == one.tokens else None) if start else None)
    return _stacked(states)


def _bounds(sequences: Sequences) -> list[tuple[int, int]]:
    """Of each sequence's tokens in a pass, the position of the first, and one more than the last's; (0, 0) if there are
    none."""
    positions, real = sequences.positions.cpu(), sequences.real.cpu()
    rows = [row[kept] for row, kept in zip(positions, real, strict=True)]
    return [(int(row[0]), int(row[-1]) + 1) if len(row) else (0, 0) for row in rows]


def _stacked(states: Sequence[Tensor | None]) -> Tensor | None:
    """[B, …], with zeros for those that are None; None if all are."""
    if (known := next((state for state in states if state is not None), None)) is None:
        return None
    return torch.stack([torch.zeros_like(known) if state is None else state for state in states])


def _known(state: Tensor | None) -> Tensor:
    if state is None:
        raise RoutingError("the request goes on from tokens that its router hasn't read.")
    return state


def _joined(known: Sequence[tuple[PassMemory, int]]) -> PassMemory:
    """The memory of these rows of memories of one route, of as many tokens each."""
    memories = [memory for memory, _ in known]

    def rows(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([one[row] for one, (_, row) in zip(tensors, known, strict=True)])

    def previous() -> Tensor | None:
        found = [(memory.previous(), row) for memory, row in known]
        return _stacked([None if before is None else before[row] for before, row in found])

    parts, ids = [memory.sequences for memory in memories], [memory.sequences.ids for memory in memories]
    seen = replace(
        parts[0],
        ids=None if ids[0] is None else rows(cast("list[Tensor]", ids)),
        positions=rows(one.positions for one in parts),
        real=rows(one.real for one in parts),
    )
    after = [memory.after for memory in memories]
    left = None if any(one is None for one in after) else rows(cast("list[Tensor]", after))
    noted = set.intersection(*(set(memory.notes) for memory in memories))
    notes = {key: rows(memory.notes[key] for memory in memories) for key in noted}
    return PassMemory(seen, previous, memories[0].whole, left, notes)
