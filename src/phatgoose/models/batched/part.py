"""A call of a module as a router is shown it that decides about some of its tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.batched.plan import BatchPlan, Group
from phatgoose.models.context.streams import Streams
from phatgoose.routers.context import RoutingContext, Sequences, Texts


@dataclass(frozen=True, eq=False)
class SubsetContext(RoutingContext):
    """A group's tokens, as rows of one length where they are, else as one row."""

    plan: BatchPlan | None = None
    group: Group | None = None
    call: RoutingContext | None = None
    """All of what the module saw."""
    streams: Streams | None = None

    @staticmethod
    def of(plan: BatchPlan, group: Group, whole: RoutingContext, streams: Streams) -> SubsetContext:
        n = len(group.items)
        return SubsetContext(
            whole.path, group.rows, n // group.rows, None, kept=_columns(plan, group, whole.rows * whole.length),
            stream=whole.stream, problem=whole.problem, by_row=whole.by_row,
            plan=plan, group=group, call=whole, streams=streams,
        )  # fmt: skip

    def tokens(self) -> Sequences:
        """The sequences matched to the group's tokens, [1, n].

        Raises:
            RoutingError: if the model was called in a way that hides them.
        """
        _, group, whole, _ = self._known()
        seen = whole.tokens()

        def part(x: Tensor) -> Tensor:
            flat = x.reshape(-1)
            return (flat if group.index is None else flat[group.index])[None]

        ids = None if seen.ids is None else part(seen.ids)
        return Sequences(ids, part(seen.positions), part(seen.real), seen.past)

    def texts(self) -> Texts:
        """What the group's items were given to read; the same object for every module that sees the pass.

        Raises:
            RoutingError: nobody has said it.
        """
        plan, group, whole, streams = self._known()
        stream, seen = whole.stream, whole.sequences
        key = (stream, whole.rows * whole.length)
        if key not in group.texts:
            if plan.told is None or seen is None:
                raise RoutingError(f"the text that module {self.path} works on is unknown.")
            seen.check()
            group.texts[key] = _texts(plan, group, seen, stream, "encoder" in streams.stacks)
        return group.texts[key]

    def note(self, chosen: Tensor, weights: Tensor) -> None:
        """Puts the group's choice at this module into the plan's loads; padding isn't counted."""
        plan, group, whole, _ = self._known()
        items = group.items
        if plan.skip is not None and plan.lengths is not None and any(plan.skip):
            new = plan.places(group, whole.rows * whole.length) >= torch.tensor(plan.skip)[items]
            items, chosen, weights = items[new], chosen[new], weights[new]
        elif plan.lengths is None and not (real := self._real()).all():
            items, chosen, weights = items[real], chosen[real], weights[real]
        members = group.version.sites[self.path].members
        plan.loads.note(id(group.version), members, items, chosen, weights)

    def _real(self) -> Tensor:
        """bool [n], on the CPU: which of the group's tokens are no padding, and aren't seen again."""
        _, group, whole, _ = self._known()
        real = torch.zeros(whole.rows, whole.length, dtype=torch.bool)
        real[:, whole.again :] = whole.new().tokens().real.reshape(whole.rows, -1).cpu()
        return real.flatten() if group.index is None else real.flatten()[group.index.cpu()]

    def _known(self) -> tuple[BatchPlan, Group, RoutingContext, Streams]:
        assert self.plan is not None
        assert self.group is not None
        assert self.call is not None
        assert self.streams is not None
        return self.plan, self.group, self.call, self.streams


def _columns(plan: BatchPlan, group: Group, tokens: int) -> Tensor | None:
    """Packed: which tokens of each of the group's items the module saw, if not all: int64, the same for each."""
    if not plan.few(tokens) or not group.route.reads_text:
        return None
    return plan.places(group, tokens)[: len(group.items) // len(group.members)]


def _texts(plan: BatchPlan, group: Group, seen: Sequences, stream: str, encoder_decoder: bool) -> Texts:
    """As `Texts` describes them, of a group's items, one a row."""
    assert plan.told is not None
    if plan.lengths is None:
        rows = torch.tensor(group.members)

        def take(x: Tensor) -> Tensor:
            return x.cpu()[rows]
    else:
        starts = torch.tensor([0, *plan.lengths]).cumsum(0)
        places = starts[list(group.members)][:, None] + torch.arange(plan.lengths[group.members[0]])

        def take(x: Tensor) -> Tensor:
            return x.cpu()[0][places]

    told = [plan.told[item] for item in group.members]
    prompts = tuple(prompt for prompt, _ in told)
    written: tuple[tuple[int, ...] | str, ...] = tuple(before for _, before in told)
    ids, real = None if seen.ids is None else take(seen.ids), take(seen.real)
    if stream == "encoder":
        return Texts(prompts, torch.zeros_like(real), ids, ((),) * len(told))
    if encoder_decoder:
        return Texts(prompts, real, ids, written, apart=True)
    read = torch.tensor([len(prompt) for prompt in prompts])
    return Texts(prompts, real & (take(seen.positions) >= read[:, None]), ids, written)
