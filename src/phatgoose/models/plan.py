"""Which way each token of a pass goes.

The tokens of a pass belong to items: rows of a batch, or sequences packed one after the other into one row. A `Plan` says
which way each item goes; None is the base alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.loads import Loads
from phatgoose.models.streams import Streams
from phatgoose.models.ways import Version, Way
from phatgoose.routers.context import RoutingContext, Sequences


@dataclass(eq=False)
class Group:
    """Tokens of one pass that go one way, or the ways of single experts of one version.

    index: int64 [n], which of the pass's tokens; None: all. items: int64 [n], whose tokens they are. experts: int64 [n], the
    single expert of each token, None if `way` chooses.
    """

    version: Version
    way: Way
    index: Tensor | None
    items: Tensor
    experts: Tensor | None


@dataclass(eq=False)
class Plan:
    """Who goes which way in a pass."""

    ways: Sequence[Way | None]
    """Of each item; None: the base alone."""
    lengths: Sequence[int] | None = None
    """Packed: how many tokens each item has, one after the other in one row. None: each item is a row (or several, repeated)."""
    kept: Tensor | None = None
    """Packed: int64, the places of the tokens that the last layers are asked for (logits_to_keep), if not of all."""
    watch: bool = False
    """Whether `loads` are summed up."""
    skip: Sequence[int] | None = None
    """How many of each item's first tokens are left out of the loads: those that were counted before."""
    loads: Loads = field(default_factory=Loads)
    _items: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _groups: dict[int, list[Group]] = field(default_factory=dict, repr=False)

    @property
    def idle(self) -> bool:
        return all(way is None for way in self.ways)

    def items(self, tokens: int) -> Tensor:
        """int64 [tokens]: the item of each token that a module saw.

        Raises:
            RoutingError: they can't be matched to the items.
        """
        if tokens not in self._items:
            self._items[tokens] = self._owners(tokens)
        return self._items[tokens]

    def _owners(self, tokens: int) -> Tensor:
        n = len(self.ways)
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
        members: dict[tuple[int, int | None], list[int]] = {}
        for item, way in enumerate(self.ways):
            if way is not None:
                single = way.single is not None
                members.setdefault((id(way.version), None if single else id(way)), []).append(item)
        owners, found = self.items(tokens), []
        for (_, key), items in members.items():
            way = self.ways[items[0]]
            assert way is not None
            index = None
            if len(items) < len(self.ways):
                index = torch.isin(owners, torch.tensor(items)).nonzero().squeeze(1)
            own = owners if index is None else owners[index]
            experts = None
            if key is None:
                table = torch.tensor([-1 if w is None or w.single is None else w.single for w in self.ways])
                experts = table[own]
            device = way.version.base.device
            index = None if index is None else index.to(device)
            found.append(Group(way.version, way, index, own, None if experts is None else experts.to(device)))
        return found

    def note(
        self, group: Group, members: tuple[int, ...], context: RoutingContext, chosen: Tensor, weights: Tensor
    ) -> None:
        """Puts one module's choice for a group's tokens into the loads; padding isn't counted."""
        assert isinstance(context, Part)
        items, tokens = group.items, context.whole[0] * context.whole[1]
        if self.skip is not None and self.lengths is not None and any(self.skip):
            place = torch.cat([torch.arange(length) for length in self.lengths])
            if self.kept is not None and tokens == len(self.kept) != len(place):
                place = place[self.kept.cpu()]
            if group.index is not None:
                place = place[group.index.cpu()]
            new = place >= torch.tensor(self.skip)[items]
            items, chosen, weights = items[new], chosen[new], weights[new]
        elif self.lengths is None and not (real := context.tokens().real[0].cpu()).all():
            items, chosen, weights = items[real], chosen[real], weights[real]
        self.loads.note(id(group.version), members, items, chosen, weights)


@dataclass(frozen=True, eq=False)
class Part(RoutingContext):
    """A call of a module as a router is shown it that decides about some of its tokens only: as one row of these."""

    plan: Plan | None = None
    index: Tensor | None = None
    whole: tuple[int, int] = (0, 0)
    streams: Streams | None = None

    def tokens(self) -> Sequences:
        assert self.plan is not None
        assert self.streams is not None
        rows, length = self.whole
        if (seen := self.streams.seen_by(self.path)) is None:
            return super().tokens()  # raises, saying why
        kept = self.plan.kept
        few = self.plan.lengths is not None and kept is not None and rows * length == len(kept)
        if few and rows * length != seen.positions.numel():
            places = kept
        else:
            seen, places = seen.aligned(rows, length), None

        def part(x: Tensor) -> Tensor:
            flat = x.reshape(-1) if places is None else x.reshape(-1)[places]
            return (flat if self.index is None else flat[self.index])[None]

        ids = None if seen.ids is None else part(seen.ids)
        return Sequences(ids, part(seen.positions), part(seen.real), seen.past)
