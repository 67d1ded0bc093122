"""`MultiRouter`: several pools and routers on one model, each token on its own route.

Whoever runs the model sets a `BatchPlan` around each pass. Tokens that go by the base alone are not touched.
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
from phatgoose.models.base.layers import first_argument, may_modify_output
from phatgoose.models.batched.plan import BatchPlan, Group, SubsetContext
from phatgoose.models.batched.version import PoolVersion
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.expert_linear import Dispatched, ExpertLinear, routing_context
from phatgoose.ops.bottleneck import Residual
from phatgoose.routers.context import RoutingContext


class MultiRouter:
    """What is attached to a model so that its tokens can take different routes.

    Whoever runs the model attaches versions, takes them off and sets plans, while no pass is running.

    Raises:
        RoutingError: the model is routed already.
    """

    def __init__(self, model: PreTrainedModel):
        if routing_of(model) is not None:
            raise RoutingError("this model is routed already: unroute it first.")
        self.model = model
        self.plan: BatchPlan | None = None
        self.streams = Streams(model)
        self._versions: dict[int, tuple[PoolVersion, tuple[Hooks, ...]]] = {}
        # One hook a module, whatever the number of versions. Of a mixture's layers every version has a stand-in
        # module of its own: only the one that has the hook runs.
        self._hooks: dict[str, tuple[nn.Module, Hooks]] = {}
        self._streams = Hooks()

    def attach(self, version: PoolVersion) -> None:
        """Makes a version's routes possible. Without a plan that uses them, nothing changes."""
        if not self._versions:
            self._streams.add(self.streams.attach())
        residuals = Hooks()
        for path, site in version.sites.items():
            if path not in self._hooks:
                hook = partial(self._hook, path, site.plain)
                hooks = Hooks([site.module.register_forward_hook(hook, with_kwargs=True)])
                self._hooks[path] = site.module, hooks
            residuals.add(site.track_residual())
        modules = [(path, self._hooks[path][0]) for path in version.sites]
        idle_check = IdleModuleCheck(self.model, modules, self.streams)
        self._versions[id(version)] = version, (residuals, idle_check.hooks)

    def detach(self, version: PoolVersion) -> None:
        """Takes a version off; its routes must not be used any more."""
        for hooks in self._versions.pop(id(version))[1]:
            hooks.remove()
        used = {path for other, _ in self._versions.values() for path in other.sites}
        for path in set(self._hooks) - used:
            self._hooks.pop(path)[1].remove()
        if not self._versions:
            self._streams.remove()

    def close(self) -> None:
        """Takes everything off: the model is as it was."""
        for version, _ in list(self._versions.values()):
            self.detach(version)

    @contextlib.contextmanager
    def following(self, plan: BatchPlan) -> Iterator[None]:
        """Passes inside follow this plan."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None

    @torch.compiler.disable  # every pass has another plan
    def _hook(
        self,
        path: str,
        plain: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        plan = self.plan
        if plan is None or plan.base_only:
            return None
        u, writable = first_argument(args, kwargs), plain and may_modify_output(module)
        if not (tokens := output.numel() // output.shape[-1]):
            return None
        # A mixture says which of the pass's tokens it sends to each of its experts.
        dispatched = args[2] if isinstance(module, ExpertLinear) and len(args) > 2 else None
        groups = plan.groups(tokens if dispatched is None else dispatched.of)
        # The usual case, all tokens on one route, in one fused call.
        if len(groups) == 1 and groups[0].index is None and not plan.count_loads:
            fused = groups[0].route.fused.get(path)
            try:
                if fused is not None and (done := fused(u, output, writable)) is not None:
                    return done
            except Exception as error:
                # Not item by item: the output may be half written. All of them fall back to the base.
                plan.fail(groups[0], error)
                return None
        call = routing_context(path, module, args, u, output.shape, self.streams)
        return self._route_groups(call, plan, groups, u, output, writable, dispatched)

    def _route_groups(
        self,
        call: RoutingContext,
        plan: BatchPlan,
        groups: list[Group],
        u: Tensor,
        output: Tensor,
        writable: bool,
        dispatched: Dispatched | None,
    ) -> Tensor | None:
        """The output with every group's updates, or None if nothing was added."""
        path = call.path
        u = u.to(output.device)
        y = output.reshape(-1, output.shape[-1])
        several = len(groups) > 1 or any(group.index is not None for group in groups)
        # Groups are cut by position, so the module must see the plan's items in the plan's order.
        in_order = plan.lengths is None and call.by_row
        if several and call.problem and not in_order:
            for group in groups:
                plan.fail(
                    group,
                    RoutingError(f"{path}: requests on different routes can't be told apart. {call.problem}"),
                )
            return None
        changed, left = None, deque(groups)
        while left:
            group = left.popleft()
            site = group.version.sites.get(path)
            part = group if dispatched is None else plan.pick(group, *dispatched)
            if site is None or part is None:
                continue
            index = part.index
            flat = u.reshape(-1) if site.embedding else u.reshape(-1, u.shape[-1])
            context = SubsetContext.of(plan, part, call, self.streams)
            try:
                if index is None:
                    changed = _route_group(path, plan, part, flat, y, context)
                    continue
                with _residual_of(site.stack.residual, index):
                    mixed = _route_group(path, plan, part, flat[index], y[index], context)
            except Exception as error:
                left.extendleft(plan.retries(group, error, len(y) if dispatched is None else dispatched.of))
                continue
            if changed is None:
                changed = y if writable else y.clone()
            changed[index] = mixed
        return None if changed is None else changed.reshape(output.shape)


def _route_group(
    path: str, plan: BatchPlan, group: Group, u: Tensor, y: Tensor, context: SubsetContext
) -> Tensor:
    """y + Σ w Δ(u) for a group's tokens."""
    route, version = group.route, group.version
    site = version.sites[path]
    if site.stack.A.device != u.device:
        site.stack = site.stack.to(u.device)
        route.fused.pop(path, None)  # it was prepared for the other stack
    fused = None if group.experts is not None else route.fused.get(path)
    if fused is not None and not plan.count_loads and (mixed := fused(u, y)) is not None:
        return mixed
    if group.experts is not None:
        chosen = version.by_expert[path].to(u.device)[group.experts][:, None]
        weights = (chosen >= 0).float()
        mixed = version.ops.mix(u, y, site.stack, chosen, weights, site.layer)
    else:
        mixed, chosen, weights = site.mix(route.bound[path], fused, u, y, context)
    if plan.count_loads:
        context.note(chosen, weights)
    return mixed


@contextlib.contextmanager
def _residual_of(residual: Residual | None, index: Tensor) -> Iterator[None]:
    """Inside, the residual stream has the rows of these tokens alone."""
    if residual is None or residual.value is None:
        yield
        return
    whole = residual.value
    residual.value = whole.reshape(-1, whole.shape[-1])[index.to(whole.device)]
    try:
        yield
    finally:
        residual.value = whole
