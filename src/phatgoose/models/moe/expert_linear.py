"""The linear layers inside fused experts, as modules that take hooks.

While any `ExpertLinear` of an experts module has a hook, that module runs expert by expert, by the formula of
transformers' experts interface, and calls the stand-ins. When the last hook is removed it runs as before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phatgoose.errors import RoutingError
from phatgoose.models.base.layers import FLOATS
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.stand_in import LinearStandIn, Runner
from phatgoose.routers.context import RoutingContext

_FUSED_ATTRIBUTES = (
    "num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate",
)  # fmt: skip
"""What transformers' experts interface puts on every fused experts module."""


class Dispatched(NamedTuple):
    """Which of an experts module's tokens are sent to one expert."""

    tokens: Tensor
    """int64 [n], in the order in which the stand-in gets them."""
    of: int
    """Number of tokens that the module was called with."""


def routing_context(
    path: str, module: nn.Module, args: tuple[Any, ...], u: Tensor, shape: torch.Size, streams: Streams
) -> RoutingContext:
    """The routing context of this call of a module on `u`, whose output has this shape."""
    if not isinstance(module, ExpertLinear):
        return streams.context(path, u, shape)
    dispatched: Dispatched | None = args[2] if len(args) > 2 else None
    # The mixture as a whole sees the pass as any module does; of its tokens this layer was given some.
    seen = streams.context(path, u, shape if dispatched is None else torch.Size((dispatched.of, 1)))
    problem, picked = seen.problem, None if dispatched is None else dispatched.tokens
    if picked is None:
        problem = "it ran outside of its mixture of experts, so which tokens it sees is unknown."
    n = shape[:-1].numel()
    return replace(seen, rows=1, length=n, kept=None, problem=problem, by_row=True, again=0, picked=picked)


def gate_and_up(experts: Any, whole: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(gate, up) of gate_up_proj's rows or outputs along `dim`: one after the other, or interleaved (GPT-OSS)."""
    if experts.is_concatenated:
        gate, up = whole.chunk(2, dim)
        return gate, up
    return whole.unflatten(dim, (-1, 2)).unbind(dim + 1 if dim >= 0 else dim)


class _UnfusedExperts(Runner):
    """Runs an experts module expert by expert."""

    def __init__(self, owner: Any):
        super().__init__(owner)
        # The module's own forward gets no tokens, so it costs nothing and needn't be replaced. `after` is the first
        # forward hook, so that other hooks get the real output.
        self.handles = [
            owner.register_forward_pre_hook(self.before, with_kwargs=True),
            owner.register_forward_hook(self.after, with_kwargs=True, prepend=True),
        ]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = _signature(type(module).forward).bind(module, *args, **kwargs).arguments
        _, hidden, index, weights = given.values()
        nothing = hidden[:0]
        # Kept on the tensor and not on self: threads may run the model at the same time.
        nothing._phatgoose_call = (hidden, index, weights)
        return (nothing, index[:0], weights[:0]), {}

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        call = getattr(args[0], "_phatgoose_call", None)
        if call is None:
            raise RoutingError(
                f"another hook has replaced the input of {type(module).__name__}, whose experts are routed: remove it, "
                "or route first."
            )
        from accelerate.utils import align_module_device

        with align_module_device(module):
            device = next(module.parameters()).device
            return self.run(*(x.to(device) for x in call)).to(output.device)

    @torch.compiler.disable  # how many tokens each expert gets can't be part of a graph
    def run(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Σ_k w_k · expert_{i_k}(u) for tokens [N, d], their experts' numbers and weights [N, k]."""
        (n, k), experts = index.shape, self.owner
        # The (token, choice) pairs sorted by expert. Numbers beyond the last expert mean no expert; they come last.
        order = index.reshape(-1).argsort(stable=True)
        counts = index.reshape(-1).bincount(minlength=experts.num_experts)[: experts.num_experts].tolist()
        tokens, start, parts = order // k, 0, []
        for j, count in enumerate(counts):
            if count:
                own = tokens[start : start + count]
                parts.append(self._expert(j, hidden[own], Dispatched(own, n)))
                start += count
        if not parts:
            return torch.zeros_like(hidden)
        done = torch.cat(parts) * weights.reshape(-1)[order[:start], None]
        if start < n * k:
            done = torch.cat([done, done.new_zeros(n * k - start, done.shape[-1])])
        return done[order.argsort()].view(n, k, -1).sum(1).to(hidden.dtype)

    def _expert(self, j: int, u: Tensor, dispatched: Dispatched) -> Tensor:
        """Expert j's output, by the formula of transformers' experts interface."""
        experts = self.owner
        if experts.has_gate:
            inner = self._layer("gate_up_proj", j, u, dispatched)
            inner = experts._apply_gate(self._call_halves(j, u, inner, dispatched))
        else:
            inner = experts.act_fn(self._layer("up_proj", j, u, dispatched))
        out = self._layer("down_proj", j, inner, dispatched)
        return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out

    def _layer(self, name: str, j: int, u: Tensor, dispatched: Dispatched) -> Tensor:
        """W u + b of a whole parameter, changed by the hooks on its stand-ins."""
        experts, weight = self.owner, getattr(self.owner, name)[j]
        y = u @ weight if experts.is_transposed else F.linear(u, weight)
        if experts.has_bias:
            y = y + getattr(experts, f"{name}_bias")[j]
        return self._call(j, name, u, y, dispatched)

    def _call(self, j: int, part: str, u: Tensor, y: Tensor, dispatched: Dispatched) -> Tensor:
        """A layer's output after the hooks on its stand-ins."""
        for layer in self.layers.get((j, part), ()):
            y = layer(u, y, dispatched)
        return y

    def _call_halves(self, j: int, u: Tensor, y: Tensor, dispatched: Dispatched) -> Tensor:
        """The same for the halves of gate_up_proj, which may have stand-ins of their own."""
        if (j, "gate_proj") not in self.layers and (j, "up_proj") not in self.layers:
            return y
        gate, up = gate_and_up(self.owner, y, -1)
        gate = self._call(j, "gate_proj", u, gate, dispatched)
        up = self._call(j, "up_proj", u, up, dispatched)
        if self.owner.is_concatenated:
            return torch.cat([gate, up], -1)
        return torch.stack([gate, up], -1).flatten(-2)


class ExpertLinear(LinearStandIn):
    """One linear layer of one expert of a fused experts module, as a module.

    part: "gate_up_proj", "down_proj", or "gate_proj" or "up_proj", the halves of the first. Experts without a gate have
    "up_proj" and "down_proj".
    """

    runner = _UnfusedExperts
    index: int
    part: str

    def __init__(self, experts: nn.Module, index: int, part: str):
        # `weight` needs them at once.
        self.__dict__.update(weight_owner=experts, index=index, part=part, key=(index, part))
        super().__init__(experts)

    @property
    def weight(self) -> Tensor:
        whole = getattr(self.weight_owner, self.parameter)[self.index]
        return self._half(whole.T if self.weight_owner.is_transposed else whole)

    @property
    def bias(self) -> Tensor | None:
        if not self.weight_owner.has_bias:
            return None
        return self._half(getattr(self.weight_owner, f"{self.parameter}_bias")[self.index])

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the layer."""
        is_half = self.weight_owner.has_gate and self.part in ("gate_proj", "up_proj")
        return "gate_up_proj" if is_half else self.part

    def _half(self, whole: Tensor) -> Tensor:
        """The rows of the parameter that belong to this part."""
        if self.parameter == self.part:
            return whole
        return gate_and_up(self.weight_owner, whole, 0)[self.part == "up_proj"]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, index={self.index}, part={self.part!r}"


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def is_fused(module: nn.Module | None) -> bool:
    """True for experts in transformers 5's fused form: 3-D parameters with its experts interface."""
    down = getattr(module, "down_proj", None)
    has_interface = all(hasattr(module, name) for name in _FUSED_ATTRIBUTES)
    return has_interface and isinstance(down, nn.Parameter) and down.ndim == 3


def check_fused(module: Any, path: str) -> None:
    """Refuses fused experts that can't run expert by expert. Raises RoutingError if weights are packed or experts are
    split over devices."""
    dtype = module.down_proj.dtype
    if dtype not in FLOATS:
        raise RoutingError(
            f"{path}: experts in {dtype} can't be routed; load the base unpacked (dtype='bfloat16')."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise RoutingError(f"{path}: its experts are split over devices, which can't be routed.")
