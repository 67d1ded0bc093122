"""Which way each token of a pass goes.

The tokens of a pass belong to items: rows of a batch, or sequences packed one after the other into one row. A `Plan` says
which way each item goes; None is the base alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.batched.loads import ExpertLoads
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.routers.context import Texts

TextSoFar = tuple[tuple[int, ...], tuple[int, ...]]
"""What an item was given to read, and what stood behind that before this pass."""
_EVERYBODYS = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))


@dataclass(eq=False)
class Group:
    """Tokens of one pass that go one way, or the ways of single experts of one version.

    members: the items. rows: into how many rows of equal length the tokens fit; 1 if they can't be told apart so. index: int64 [n], which of the
    pass's tokens; None: all. items: int64 [n], whose tokens they are. experts: int64 [n], the single expert of each token, None if
    `way` chooses.
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
    of: tuple[Group, int, Tensor] | None = None
    """Where tokens were picked for one of a mixture's experts: the group in the whole pass, its number of tokens, and which of the group's
    these are."""


@dataclass(eq=False)
class BatchPlan:
    """Who goes which way in a pass."""

    routes: Sequence[Route | None]
    """Of each item; None: the base alone."""
    lengths: Sequence[int] | None = None
    """Packed: how many tokens each item has, one after the other in one row. None: each item is a row."""
    kept: Tensor | None = None
    """Packed: int64, the places of the tokens that the last layers are asked for (logits_to_keep), if not of all."""
    watch: bool = False
    """Whether `loads` are summed up."""
    skip: Sequence[int] | None = None
    """How many of each item's first tokens are left out of the loads: those that were counted before."""
    told: Sequence[TextSoFar] | None = None
    """Of each item, for ways that read text."""
    failed: dict[int, Exception] | None = None
    """What went wrong with which items, where that is collected: they go by the base for the rest of the pass, the others as if those
    hadn't been there. None: it is raised."""
    loads: ExpertLoads = field(default_factory=ExpertLoads)
    _items: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _groups: dict[int, list[Group]] = field(default_factory=dict, repr=False)

    @property
    def idle(self) -> bool:
        return all(route is None for route in self.routes)

    def items(self, tokens: int) -> Tensor:
        """int64 [tokens]: the item of each token that a module saw.

        Raises:
            RoutingError: they can't be matched to the items.
        """
        if tokens not in self._items:
            self._items[tokens] = self._owners(tokens)
        return self._items[tokens]

    def _owners(self, tokens: int) -> Tensor:
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
        """Those of a module's tokens that experts act on, by way."""
        if tokens not in self._groups:
            self._groups[tokens] = self._grouped(tokens)
        return self._groups[tokens]

    def _grouped(self, tokens: int) -> list[Group]:
        owners = self.items(tokens)
        counts = owners.bincount(minlength=len(self.routes)).tolist()
        members: dict[tuple[object, ...], list[int]] = {}
        for item, route in enumerate(self.routes):
            if route is not None and counts[item] and item not in (self.failed or ()):
                members.setdefault(self._key(item, route, counts[item]), []).append(item)
        return [self._group(items, owners, counts) for items in members.values()]

    def _key(self, item: int, route: Route, count: int) -> tuple[object, ...]:
        """Items with the same key run together."""
        if route.single is not None:
            return (id(route.version),)
        if route.reads_text and self.lengths is not None:  # its texts are rows of one length
            return id(route.version), id(route), self.lengths[item], count
        return id(route.version), id(route)

    def _group(self, members: list[int], owners: Tensor, counts: list[int]) -> Group:
        route = self.routes[members[0]]
        assert route is not None
        index, device = None, route.version.base.device
        if sum(counts[i] for i in members) < len(owners):
            index = torch.isin(owners, torch.tensor(members)).nonzero().squeeze(1)
        own = owners if index is None else owners[index]
        experts = None
        if route.single is not None:
            table = torch.tensor([-1 if w is None or w.single is None else w.single for w in self.routes])
            experts = table[own].to(device)
        even = self.lengths is None or route.reads_text
        index = None if index is None else index.to(device)
        return Group(route.version, route, tuple(members), len(members) if even else 1, index, own, experts)

    def picked(self, group: Group, tokens: Tensor, of: int) -> Group | None:
        """Those of a group's tokens that are among `tokens` (int64 [n], of the pass's `of`), with their places there; None if none is."""
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
            of=(group, of, which),
        )

    def blamed(self, group: Group, error: Exception, tokens: int) -> list[Group]:
        """What to try in place of a group that went wrong: each of its items alone. Of one that was alone nothing: it has failed.

        Raises:
            Exception: `error`, where nobody collects it, or memory or a device is to blame, which concerns everybody.
        """
        if self.failed is None or isinstance(error, _EVERYBODYS):
            raise error
        if len(group.members) == 1:
            self.fail(group, error)
            return []
        owners = self.items(tokens)
        counts = owners.bincount(minlength=len(self.routes)).tolist()
        return [self._group([item], owners, counts) for item in group.members]

    def fail(self, group: Group, error: Exception) -> None:
        """Takes a group's items off their way, or raises, as `blamed` does."""
        if self.failed is None or isinstance(error, _EVERYBODYS):
            raise error
        self.failed |= dict.fromkeys(group.members, error)
        self._groups.clear()

    def few(self, tokens: int) -> bool:
        """Whether a module that saw so many tokens saw those at `kept`, and not all."""
        if self.lengths is None or self.kept is None:
            return False
        return tokens == len(self.kept) != sum(self.lengths)

    def places(self, group: Group, tokens: int) -> Tensor:
        """Packed: int64 [n], which token of its item each of a group's tokens is."""
        if group.of is not None:
            return self.places(*group.of[:2])[group.of[2]]
        assert self.lengths is not None
        place = torch.cat([torch.arange(length) for length in self.lengths])
        if self.few(tokens):
            assert self.kept is not None
            place = place[self.kept.cpu()]
        return place if group.index is None else place[group.index.cpu()]
