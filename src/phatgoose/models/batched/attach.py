"""Several pools and routers on one model at once: every token of a pass goes its own way.

Who runs the model says by a `Plan` around each pass which way each of its sequences goes. What goes by the base alone is not
touched.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.attach.idle_modules import IdleModuleCheck
from phatgoose.models.base.layers import first_argument, is_plain_linear, may_modify_output, track_residual
from phatgoose.models.batched.part import SubsetContext
from phatgoose.models.batched.plan import BatchPlan, Group
from phatgoose.models.batched.version import PoolVersion
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.expert_linear import Dispatched, ExpertLinear, routing_context
from phatgoose.ops.bottleneck import Residual
from phatgoose.routers.context import RoutingContext


class MultiRouter:
    """What is attached to a model so that its tokens can go different ways.

    Versions are attached and taken off, and plans are set, by whoever runs the model, while no pass is running.

    Raises:
        RoutingError: the model is routed already.
    """

    def __init__(self, model: PreTrainedModel):
        if routing_of(model) is not None:
            raise RoutingError("this model is routed already: unroute it first.")
        self.model = model
        self.plan: BatchPlan | None = None
        self.streams = Streams(model)
        self._versions: dict[int, tuple[PoolVersion, Hooks, IdleModuleCheck]] = {}
        # A router or an expert of a mixture is another stand-in in each version: the one that has the hook is the one that runs.
        self._hooks: dict[str, tuple[nn.Module, Hooks]] = {}
        self._streams = Hooks()

    def attach(self, version: PoolVersion) -> None:
        """Makes a version's ways possible. Without a plan that uses them, nothing changes."""
        if not self._versions:
            self._streams.add(self.streams.attach())
        handles = Hooks()
        for path, site in version.sites.items():
            if path not in self._hooks:
                hook = partial(self._hook, path, is_plain_linear(site.module))
                hooks = Hooks([site.module.register_forward_hook(hook, with_kwargs=True)])
                self._hooks[path] = site.module, hooks
            if site.source is not None and site.stack.residual is not None:
                handles.add(track_residual(site.source, site.module, site.stack.residual))
        unrun = IdleModuleCheck(
            self.model, [(path, self._hooks[path][0]) for path in version.sites], self.streams
        )
        unrun.attach()
        self._versions[id(version)] = (version, handles, unrun)

    def detach(self, version: PoolVersion) -> None:
        """Takes a version off; its ways must not be used any more."""
        _, handles, unrun = self._versions.pop(id(version))
        handles.remove()
        unrun.hooks.remove()
        used = {path for other, *_ in self._versions.values() for path in other.sites}
        for path in set(self._hooks) - used:
            self._hooks.pop(path)[1].remove()
        if not self._versions:
            self._streams.remove()

    def close(self) -> None:
        """Takes everything off: the model is as it was."""
        for version, *_ in list(self._versions.values()):
            self.detach(version)

    @contextlib.contextmanager
    def following(self, plan: BatchPlan) -> Iterator[None]:
        """Passes inside go by this plan."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None

    @torch.compiler.disable  # it goes by a plan, which is another for each pass
    def _hook(
        self,
        path: str,
        fresh: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        plan = self.plan
        if plan is None or plan.idle:
            return None
        u, writable = first_argument(args, kwargs), fresh and may_modify_output(module)
        if not (tokens := output.numel() // output.shape[-1]):
            return None
        # Of the tokens that reach one of a mixture's experts it is known which of the pass's they are.
        dispatched = args[2] if isinstance(module, ExpertLinear) and len(args) > 2 else None
        groups = plan.groups(tokens if dispatched is None else dispatched.of)
        if len(groups) == 1 and groups[0].index is None and not plan.watch:
            fused = groups[0].route.fused.get(path)
            try:
                if fused is not None and (done := fused(u, output, writable)) is not None:
                    return done
            except Exception as error:  # the output may be half written
                plan.fail(groups[0], error)
                return None
        whole = routing_context(path, module, args, u, output.shape, self.streams)
        return self._by_groups(whole, plan, groups, u, output, writable, dispatched)

    def _by_groups(
        self,
        whole: RoutingContext,
        plan: BatchPlan,
        groups: list[Group],
        u: Tensor,
        output: Tensor,
        writable: bool,
        dispatched: Dispatched | None,
    ) -> Tensor | None:
        path = whole.path
        u = u.to(output.device)
        y = output.reshape(-1, output.shape[-1])
        apart = len(groups) > 1 or any(group.index is not None for group in groups)
        if apart and (problem := _unordered(plan, whole)):
            for group in groups:
                plan.fail(
                    group,
                    RoutingError(f"{path}: requests that go different ways can't be told apart. {problem}"),
                )
            return None
        changed, left = None, deque(groups)
        while left:
            group = left.popleft()
            site = group.version.sites.get(path)
            part = group if dispatched is None else plan.picked(group, *dispatched)
            if site is None or part is None:
                continue
            index = part.index
            flat = u.reshape(-1) if site.embedding else u.reshape(-1, u.shape[-1])
            context = SubsetContext.of(plan, part, whole, self.streams)
            try:
                if index is None:
                    changed = _act(path, plan, part, flat, y, context)
                    continue
                with _of_residual(site.stack.residual, index):
                    mixed = _act(path, plan, part, flat[index], y[index], context)
            except Exception as error:
                left.extendleft(plan.blamed(group, error, len(y) if dispatched is None else dispatched.of))
                continue
            if changed is None:
                changed = y if writable else y.clone()
            changed[index] = mixed
        return None if changed is None else changed.reshape(output.shape)


def _unordered(plan: BatchPlan, whole: RoutingContext) -> str | None:
    """Why it can't be known whose tokens a module saw; None if they are the plan's items' in order."""
    return whole.problem if plan.lengths is not None or not whole.by_row else None


def _act(path: str, plan: BatchPlan, group: Group, u: Tensor, y: Tensor, context: SubsetContext) -> Tensor:
    """y + Σ w Δ(u) for a group's tokens."""
    route, site = group.route, group.version.sites[path]
    if site.stack.A.device != u.device:
        site.stack = site.stack.to(u.device)
        route.fused.pop(path, None)  # it was made of the other
    fused = None if group.experts is not None else route.fused.get(path)
    mixed = None
    if fused is not None and not plan.watch:
        mixed = fused(u, y)
    if mixed is None:
        if fused is not None and fused.can(u, y):
            mixed, chosen, weights = fused.with_choice(u, y)
        elif group.experts is not None:
            chosen = group.version.slots[path].to(u.device)[group.experts][:, None]
            weights = (chosen >= 0).float()
            mixed = group.version.ops.mix(u, y, site.stack, chosen, weights, site.layer)
        else:
            chosen, weights = route.choose(path, u, y, context)
            mixed = group.version.ops.mix(u, y, site.stack, chosen, weights, site.layer)
        if plan.watch:
            context.note(chosen, weights)
    return mixed


@contextlib.contextmanager
def _of_residual(residual: Residual | None, index: Tensor) -> Iterator[None]:
    """The residual stream as it belongs to these tokens alone."""
    if residual is None or residual.value is None:
        yield
        return
    whole = residual.value
    residual.value = whole.reshape(-1, whole.shape[-1])[index.to(whole.device)]
    try:
        yield
    finally:
        residual.value = whole
