"""`SubsetContext`: the `RoutingContext` of a group, which has a subset of a module's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.batched.plan import BatchPlan, Group
from phatgoose.models.context.streams import Streams
from phatgoose.routers.context import RoutingContext, Sequences, Texts


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
        kept = None
        # Packed: which tokens of each item the module saw, if not all. They are the same for every item of the group.
        if plan.is_kept_part(tokens) and group.route.reads_text:
            kept = plan.positions(group, tokens)[: n // len(group.members)]
        return SubsetContext(
            call.path, group.rows, n // group.rows, None, kept=kept,
            stream=call.stream, problem=call.problem, by_row=call.by_row,
            plan=plan, group=group, call=call, streams=streams,
        )  # fmt: skip

    def tokens(self) -> Sequences:
        """The sequences matched to the group's tokens, [1, n].

        Raises:
            RoutingError: the model was called in a way that hides them.
        """
        group, seen = self.group, self.call.tokens()

        def subset(x: Tensor) -> Tensor:
            flat = x.reshape(-1)
            return (flat if group.index is None else flat[group.index])[None]

        ids = None if seen.ids is None else subset(seen.ids)
        return Sequences(ids, subset(seen.positions), subset(seen.real), seen.past)

    def texts(self) -> Texts:
        """What the group's items were given to read; the same object for every module that sees the pass.

        Raises:
            RoutingError: the plan doesn't say.
        """
        plan, group, call = self.plan, self.group, self.call
        stream, seen = call.stream, call.sequences
        key = (stream, call.rows * call.length)
        if key not in group.texts:
            if plan.texts is None or seen is None:
                raise RoutingError(f"the text that module {self.path} works on is unknown.")
            seen.check()
            group.texts[key] = _texts_of(plan, group, seen, stream, "encoder" in self.streams.stacks)
        return group.texts[key]

    def note(self, chosen: Tensor, weights: Tensor) -> None:
        """Adds the group's choice at this module to the plan's loads; padding isn't counted."""
        plan, group, call = self.plan, self.group, self.call
        items = group.items
        if plan.skip is not None and plan.lengths is not None and any(plan.skip):
            new = plan.positions(group, call.rows * call.length) >= torch.tensor(plan.skip)[items]
            items, chosen, weights = items[new], chosen[new], weights[new]
        elif plan.lengths is None and not (counted := self._counted()).all():
            items, chosen, weights = items[counted], chosen[counted], weights[counted]
        members = group.version.sites[self.path].members
        plan.loads.note(id(group.version), members, items, chosen, weights)

    def _counted(self) -> Tensor:
        """bool [n], on the CPU: which of the group's tokens are real, and seen for the first time."""
        group, call = self.group, self.call
        counted = torch.zeros(call.rows, call.length, dtype=torch.bool)
        counted[:, call.again :] = call.new().tokens().real.reshape(call.rows, -1).cpu()
        return counted.flatten() if group.index is None else counted.flatten()[group.index.cpu()]


def _texts_of(plan: BatchPlan, group: Group, seen: Sequences, stream: str, encoder_decoder: bool) -> Texts:
    """The `Texts` of a group's items, one a row."""
    assert plan.texts is not None
    if plan.lengths is None:
        rows = torch.tensor(group.members)

        def take(x: Tensor) -> Tensor:
            return x.cpu()[rows]
    else:
        starts = torch.tensor([0, *plan.lengths]).cumsum(0)
        columns = starts[list(group.members)][:, None] + torch.arange(plan.lengths[group.members[0]])

        def take(x: Tensor) -> Tensor:
            return x.cpu()[0][columns]

    texts = [plan.texts[item] for item in group.members]
    prompts = tuple(prompt for prompt, _ in texts)
    written: tuple[tuple[int, ...] | str, ...] = tuple(before for _, before in texts)
    ids, real = None if seen.ids is None else take(seen.ids), take(seen.real)
    if stream == "encoder":
        return Texts(prompts, torch.zeros_like(real), ids, ((),) * len(texts))
    if encoder_decoder:
        return Texts(prompts, real, ids, written, apart=True)
    read = torch.tensor([len(prompt) for prompt in prompts])
    return Texts(prompts, real & (take(seen.positions) >= read[:, None]), ids, written)
