"""Mixture-of-experts bases: the linear layers inside fused experts, made modules that hooks can be put on.

transformers 5 keeps the experts of a mixture in two 3-D parameters of one module, so expert j's linear layers are no modules. A
`ExpertLinear` stands for one of them: it has the layer's sizes, weight and bias, and takes forward hooks as the layer itself would. While
any slot has a hook, its experts module runs expert by expert, by transformers' own formula, and calls the slots. The
module, its names and its state dict stay as they are, and when the last hook is removed it runs as before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from phatgoose.errors import RoutingError
from phatgoose.models.attach.hooks import StandInHandle
from phatgoose.models.context.streams import Streams
from phatgoose.routers.context import RoutingContext, unmatched

_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Dispatched(NamedTuple):
    """Which of the tokens that an experts module was given reach one expert."""

    tokens: Tensor
    """int64 [n], in the order in which the slot sees them."""
    of: int
    """How many tokens the module was given."""


def routing_context(
    path: str, module: nn.Module, args: tuple[Any, ...], u: Tensor, shape: torch.Size, streams: Streams
) -> RoutingContext:
    """What a router may know of this call of a module on `u`, whose output has this shape."""
    if not isinstance(module, ExpertLinear):
        return streams.context(path, u, shape)
    seen, problem = streams.tokens_of(path, u), None
    dispatched: Dispatched | None = args[2] if len(args) > 2 else None
    if dispatched is None:
        problem = "it ran outside of its mixture of experts, so which tokens it sees is unknown."
    elif seen is not None and seen.positions.numel() != dispatched.of:
        what = unmatched((dispatched.of,), *seen.positions.shape)
        problem = f"{what}."
    return RoutingContext(
        path, 1, shape[:-1].numel(), seen, reader=streams.texts_of, stream=streams.stream_at(path, u), problem=problem,
        picked=None if dispatched is None else dispatched.tokens,
    )  # fmt: skip


class ExpertLinear(nn.Module):
    """One linear layer of one expert of a fused experts module, as a module.

    part: "gate_up_proj", "gate_proj" or "up_proj" (a half of it), "down_proj"; of experts without a gate "up_proj" and "down_proj".
    """

    experts: Any
    index: int
    part: str

    def __init__(self, experts: nn.Module, index: int, part: str):
        super().__init__()
        self.__dict__["experts"] = experts  # not a submodule: the slot owns nothing of it
        self.index, self.part = index, part
        self.out_features, self.in_features = self.weight.shape

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight, and has it moved where it is offloaded."""
        module: nn.Module = self.experts
        return module

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in], a view of the module's parameter."""
        whole = getattr(self.experts, self.parameter)[self.index]
        return self._half(whole.T if self.experts.is_transposed else whole)

    @property
    def bias(self) -> Tensor | None:
        if not self.experts.has_bias:
            return None
        return self._half(getattr(self.experts, f"{self.parameter}_bias")[self.index])

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the layer."""
        return (
            "gate_up_proj" if self.experts.has_gate and self.part in ("gate_proj", "up_proj") else self.part
        )

    def _half(self, whole: Tensor) -> Tensor:
        """The rows of gate_up_proj that are this part's."""
        if self.parameter == self.part:
            return whole
        up = self.part == "up_proj"
        return whole.chunk(2)[up] if self.experts.is_concatenated else whole[int(up) :: 2]

    def forward(self, u: Tensor, y: Tensor | None = None, dispatched: Dispatched | None = None) -> Tensor:
        """W u + b, which is `y` where the experts module has computed it already. u: [n, d_in]."""
        return F.linear(u, self.weight, self.bias) if y is None else y

    def register_forward_hook(self, hook: Callable[..., Any], **how: Any) -> RemovableHandle:
        handle = super().register_forward_hook(hook, **how)
        opened = _opened(self.experts) or _Opened(self.experts)
        opened.add(self)
        return StandInHandle(handle, self)

    def closed(self) -> None:
        """A hook was removed: with the last one of all its slots, the experts module runs as it did."""
        opened = _opened(self.experts)
        if opened is not None and not self._forward_hooks:
            opened.drop(self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, index={self.index}, part={self.part!r}"


class _Opened:
    """An experts module that runs expert by expert; known by its hooks on the module."""

    def __init__(self, experts: Any):
        self.experts = experts
        self.slots: dict[tuple[int, str], list[ExpertLinear]] = {}
        # The module itself is given no tokens: it costs nothing and needn't be replaced. Hooks of others see its real output.
        self._handles = [
            experts.register_forward_pre_hook(self.before, with_kwargs=True),
            experts.register_forward_hook(self.after, with_kwargs=True, prepend=True),
        ]

    def add(self, slot: ExpertLinear) -> None:
        there = self.slots.setdefault((slot.index, slot.part), [])
        if not any(known is slot for known in there):
            there.append(slot)

    def drop(self, slot: ExpertLinear) -> None:
        key = slot.index, slot.part
        left = [known for known in self.slots.get(key, ()) if known is not slot]
        if left:
            self.slots[key] = left
        else:
            self.slots.pop(key, None)
        if not self.slots:
            for handle in self._handles:
                handle.remove()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = _signature(type(module).forward).bind(module, *args, **kwargs).arguments
        _, hidden, index, weights = given.values()
        nothing = hidden[:0]
        nothing._phatgoose_call = (hidden, index, weights)
        return (nothing, index[:0], weights[:0]), {}

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        call = getattr(args[0], "_phatgoose_call", None)
        if call is None:
            raise RoutingError(
                f"another hook has replaced the input of {type(module).__name__}, whose experts are routed: remove it, or route first."
            )
        from accelerate.utils import align_module_device

        with align_module_device(module):
            device = next(module.parameters()).device
            return self.run(*(x.to(device) for x in call)).to(output.device)

    @torch.compiler.disable  # who gets how many tokens is no part of a graph
    def run(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Σ_k w_k · expert_{i_k}(u) for tokens [N, d], their experts' numbers and weights [N, k]."""
        (n, k), experts = index.shape, self.experts
        order = index.reshape(-1).argsort(stable=True)  # numbers beyond the last expert mean nobody
        counts = index.reshape(-1).bincount(minlength=experts.num_experts)[: experts.num_experts].tolist()
        tokens, start, parts = order // k, 0, []
        for j, count in enumerate(counts):
            if count:
                of = tokens[start : start + count]
                parts.append(self._expert(j, hidden[of], Dispatched(of, n)))
                start += count
        if not parts:
            return torch.zeros_like(hidden)
        done = torch.cat(parts) * weights.reshape(-1)[order[:start], None]
        if start < n * k:
            done = torch.cat([done, done.new_zeros(n * k - start, done.shape[-1])])
        return done[order.argsort()].view(n, k, -1).sum(1).to(hidden.dtype)

    def _expert(self, j: int, u: Tensor, of: Dispatched) -> Tensor:
        experts = self.experts
        if experts.has_gate:
            inner = self._through(j, "gate_up_proj", u, self._product("gate_up_proj", j, u), of)
            inner = experts._apply_gate(self._halves(j, u, inner, of))
        else:
            inner = experts.act_fn(self._through(j, "up_proj", u, self._product("up_proj", j, u), of))
        out = self._through(j, "down_proj", inner, self._product("down_proj", j, inner), of)
        return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out

    def _product(self, name: str, j: int, u: Tensor) -> Tensor:
        experts, weight = self.experts, getattr(self.experts, name)[j]
        y = u @ weight if experts.is_transposed else F.linear(u, weight)
        return y + getattr(experts, f"{name}_bias")[j] if experts.has_bias else y

    def _through(self, j: int, part: str, u: Tensor, y: Tensor, of: Dispatched) -> Tensor:
        """What the hooks at a slot make of its output."""
        for slot in self.slots.get((j, part), ()):
            y = slot(u, y, of)
        return y

    def _halves(self, j: int, u: Tensor, y: Tensor, of: Dispatched) -> Tensor:
        if (j, "gate_proj") not in self.slots and (j, "up_proj") not in self.slots:
            return y
        apart = y.chunk(2, dim=-1) if self.experts.is_concatenated else (y[..., ::2], y[..., 1::2])
        gate, up = (
            self._through(j, part, u, half, of)
            for part, half in zip(("gate_proj", "up_proj"), apart, strict=True)
        )
        return (
            torch.cat([gate, up], -1)
            if self.experts.is_concatenated
            else torch.stack([gate, up], -1).flatten(-2)
        )


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _opened(experts: nn.Module) -> _Opened | None:
    """What runs this module expert by expert, if anything does."""
    owners = (getattr(hook, "__self__", None) for hook in experts._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, _Opened)), None)


def is_fused(module: nn.Module | None) -> bool:
    """Whether a module holds experts in transformers 5's fused form: 3-D parameters with its experts interface."""
    down = getattr(module, "down_proj", None)
    return all(hasattr(module, name) for name in _FLAGS) and isinstance(down, nn.Parameter) and down.ndim == 3


def check_fused(module: Any, path: str) -> None:
    """Refuses fused experts that can't run expert by expert here.

    Raises:
        RoutingError: packed weights, or experts split over devices.
    """
    dtype = module.down_proj.dtype
    if dtype not in _FLOATS:
        raise RoutingError(
            f"{path}: experts in {dtype} can't be routed; load the base unpacked (dtype='bfloat16')."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise RoutingError(f"{path}: its experts are split over devices, which can't be routed.")
