"""The CPU backend: what the compiled kernel (kernel/update.cpp) accepts, and how it is called.

It computes in float32 and bfloat16, for inference only, with the results of `phatgoose.ops.reference`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.memory import available_bytes
from phatgoose.ops import fast
from phatgoose.ops.cpu.build import library
from phatgoose.ops.fused import USE_ANOTHER, Choice, KernelMix, KernelRouting, kernel_obstacle, refusal
from phatgoose.ops.operands import check_choice, check_is, kernel_operands, tokens_of
from phatgoose.ops.quantized_gates import LANES, kernel_gates
from phatgoose.ops.stack import Layer, Stack

DTYPES = (torch.float32, torch.bfloat16)
_DTYPE_CODES = {(u, y): i | j << 1 for i, u in enumerate(DTYPES) for j, y in enumerate(DTYPES)}
"""dtypes of (u, y) → what dispatch.cpp takes for them."""

# Other routers want the scores of every expert. That is one product, which torch does well.
gate_scores, choose = fast.gate_scores, fast.choose


class Prefetch(ctypes.Structure):
    """kernel/interface.h's Prefetch."""

    _fields_ = (("limit", ctypes.c_int64), ("bytes", ctypes.c_int64), ("epoch", ctypes.c_uint32))


@cache
def shared_prefetch() -> Prefetch:
    """One for all modules, since they share the memory. Half of what is free now is left for whatever else comes."""
    return Prefetch(available_bytes() // 2, 0, 1)


class Site(ctypes.Structure):
    """kernel/interface.h's Site: one module, as the kernel is told of it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "experts", "top_k")),
        *((name, ctypes.c_void_p) for name in ("gates", "codes", "step", "sum", "lost")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "starts", "ranks", "scales")),
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("prefetch", "fetched")),
    )
    tensors: tuple[Tensor, ...]
    """What it points into: a struct of addresses keeps nothing alive."""


def _site(rows: Sequence[Tensor], top_k: int, gates: Sequence[Tensor] = ()) -> Site:
    """The struct that points into these contiguous tensors and keeps them. Hold it while the kernel runs.

    `rows` are `KernelOperands.tensors`; `gates` are `kernel_gates`, or empty if the choice is made elsewhere.
    """
    a, b, owners, scales = rows
    site = Site(a.shape[1], b.shape[1], owners.shape[1], top_k, kind=DTYPES.index(a.dtype))
    site.a, site.b, site.scales = a.data_ptr(), b.data_ptr(), scales.data_ptr()
    site.starts, site.ranks = owners[0].data_ptr(), owners[1].data_ptr()
    if gates:
        exact, codes, facts = gates
        site.gates, site.codes = exact.data_ptr(), codes.data_ptr()
        site.step, site.sum, site.lost = (row.data_ptr() for row in facts)
    site.tensors = (*rows, *gates)
    return site


def _stack_site(stack: Stack, top_k: int, gates: Sequence[Tensor] = ()) -> Site:
    """As `_site`. If the stack's rows are mapped from a file, the kernel asks for them before it reads them."""
    site = _site(kernel_operands(stack).tensors, top_k, gates)
    if stack.prefetch:
        fetched = stack.__dict__.setdefault("_known_fetched", torch.zeros(stack.experts, dtype=torch.int32))
        site.prefetch, site.fetched = ctypes.addressof(shared_prefetch()), fetched.data_ptr()
        site.tensors = (*site.tensors, fetched)
    return site


_MIXING_SITES: WeakKeyDictionary[Stack, dict[int, Site]] = WeakKeyDictionary()
"""Sites of `mix`, by stack and number of choices. They aren't kept in the stack, because pointers can't be copied."""
_LOCK = threading.Lock()
"""Guards _MIXING_SITES. Without it, two threads that come first would replace what the other's kernel reads."""


def _mixing_site(stack: Stack, k: int) -> Site:
    """The struct for this stack that takes k choices made elsewhere."""
    with _LOCK:
        known = _MIXING_SITES.setdefault(stack, {})
        if k not in known:
            known[k] = _stack_site(stack, k)
        return known[k]


def _run(
    site: Site, u: Tensor, y: Tensor, tokens: int, chosen: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """What the kernel computes. It reads `chosen` and `weights`, or if the site has gates, writes into them."""
    u, y = u.contiguous(), y.contiguous()
    out = torch.empty_like(y)
    code = library().run(
        0, ctypes.addressof(site), u.data_ptr(), y.data_ptr(), out.data_ptr(), tokens,
        None if chosen is None else chosen.data_ptr(), None if weights is None else weights.data_ptr(),
        _DTYPE_CODES[u.dtype, y.dtype],
    )  # fmt: skip
    if code:
        raise _failure(code, site, tokens)
    return out


def _failure(code: int, site: Site, tokens: int) -> Exception:
    """What the kernel's code means."""
    if code == 3:
        return RoutingError(f"an expert was chosen that there isn't: there are {site.experts}.")
    return MemoryError(f"the CPU kernel found no memory for {tokens} tokens.")


def obstacle(u: Tensor, y: Tensor, stack: Stack) -> str | None:
    """Why the kernel can't do this call, and what to do; None if it can."""
    if not (u.is_cpu and y.is_cpu and stack.A.is_cpu):
        return f"it runs on CPUs only. {USE_ANOTHER}"
    return kernel_obstacle(u, y, stack, DTYPES)


def _low_rank(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # which can optimise torch's own operations
        return fast.low_rank(u, y, stack, chosen, weights)
    check_choice(chosen, weights, tokens_of(u, y, stack.A.shape[1], stack.B.shape[1]))
    if not any(stack.ranks):
        return y
    tokens, k = chosen.shape
    return _run(_mixing_site(stack, k), u, y, tokens, chosen.contiguous(), weights.float().contiguous())


mix = KernelMix("cpu", obstacle, _low_rank)


def _direct(u: Tensor, y: Tensor) -> int | None:
    """What dispatch.cpp takes for these dtypes; None if the kernel can't be called with these tensors as they are."""
    dtypes = _DTYPE_CODES.get((u.dtype, y.dtype))
    if (
        dtypes is None
        or not (u.is_cpu and y.is_cpu)
        or torch.compiler.is_compiling()
        or type(u) is not Tensor
        or type(y) is not Tensor
        or (torch.is_grad_enabled() and (u.requires_grad or y.requires_grad))
    ):
        return None
    return dtypes


class _SiteCalls:
    """Calls the kernel for one site. A call takes a few microseconds, so whatever can be looked up once is."""

    def __init__(self, site: Site, stack: Stack):
        self.site, self.stack = site, stack
        self.site_address, self._library_run = ctypes.addressof(site), library().run
        self._last_shapes: tuple[torch.Size | None, torch.Size | None, int] = (None, None, 0)

    def run(
        self,
        u: Tensor,
        y: Tensor,
        into_y: bool,
        choice_at: tuple[int | None, int | None],
        dtypes: int,
        chosen: int | None = None,
    ) -> Tensor:
        """What the kernel computes, in y if `into_y`.

        Args:
            choice_at: addresses of a choice and its weights, or None.
            chosen: for how many tokens there is a choice, if it is read.
        """
        # Shapes rarely change between calls, and to check them takes as long as a small call.
        shapes = self._last_shapes
        if u.shape != shapes[0] or y.shape != shapes[1]:
            shapes = self.check_shapes(u, y)
        if chosen is not None and chosen != shapes[2]:
            raise RoutingError(f"there is a choice for {chosen} tokens, and the module saw {shapes[2]}.")
        if not u.is_contiguous():
            u = u.contiguous()
        if not y.is_contiguous():
            y, into_y = y.contiguous(), True
        out = y if into_y else torch.empty_like(y)
        code = self._library_run(
            0, self.site_address, u.data_ptr(), y.data_ptr(), out.data_ptr(), shapes[2], *choice_at, dtypes
        )
        if code:
            raise _failure(code, self.site, shapes[2])
        return out

    def check_shapes(self, u: Tensor, y: Tensor) -> tuple[torch.Size, torch.Size, int]:
        """Both shapes and the number of tokens, which are kept for the next call."""
        tokens = tokens_of(u, y, self.stack.A.shape[1], self.stack.B.shape[1])
        self._last_shapes = shapes = (u.shape, y.shape, tokens)
        return shapes


class CpuRouting(KernelRouting):
    """Score, choose and mix of one module in one call of the kernel.

    Raises:
        RoutingError: as `KernelRouting`; or the stack isn't in float32 or bfloat16, or not on a CPU.
    """

    mixing = mix

    def __init__(
        self, gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None, strict: bool = True
    ):
        if (why := obstacle(stack.A, stack.B, stack)) is not None:
            raise refusal("cpu", why)
        super().__init__(gates, top_k, stack, layer, strict)
        self.gate_operands = kernel_gates(self.gates)
        self.calls = _SiteCalls(_stack_site(stack, self.top_k, self.gate_operands), stack)

    def __call__(
        self,
        u: Tensor,
        y: Tensor,
        into_y: bool = False,
        choice_at: tuple[int | None, int | None] = (None, None),
    ) -> Tensor | None:
        """y + Σ w Δ(u), as `FusedRouting.__call__`.

        Args:
            choice_at: addresses to which the chosen experts, int64 [N, k], and their weights, float32 [N, k],
                are written. The stack must be `plain`.

        Raises:
            RoutingError: as `mix`, if `strict`; or u or y has another shape.
        """
        if (dtypes := _direct(u, y)) is None:
            return self.as_operator(u, y) if self.accepts(u, y) else None
        if not self.plain:
            return self.with_choice(u, y)[0]
        return self.calls.run(u, y, into_y, choice_at, dtypes)

    def with_choice(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, who was chosen, int64 [N, k], and their weights, float32 [N, k]; u and y of any shape."""
        tokens, k = self.calls.check_shapes(u, y)[2], self.top_k
        chosen = torch.empty(tokens, k, dtype=torch.int64)
        weights = torch.empty(tokens, k, dtype=torch.float32)
        out = _run(self.calls.site, u, y, tokens, chosen, weights)
        return fast.with_others(out, u, y, self.stack, chosen, weights, self.layer), chosen, weights


def fuse(
    gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None, strict: bool = True
) -> CpuRouting | None:
    """The three steps in one call; None for an embedding or, if not `strict`, a stack that the kernel can't take."""
    if stack.embedding or (not strict and obstacle(stack.A, stack.B, stack) is not None):
        return None
    return CpuRouting(gates, top_k, stack, layer, strict)


class CpuGivenMix:
    """`mix` at one module for choices that are made elsewhere; k of each token."""

    def __init__(self, stack: Stack):
        self.stack = stack
        self._calls: dict[int, _SiteCalls] = {}

    def __reduce__(self) -> Any:
        # A copied model copies its routing. Whatever points into memory is made anew.
        return type(self), (self.stack,)

    def __call__(self, u: Tensor, y: Tensor, choice: Choice, into_y: bool = False) -> Tensor | None:
        """y + Σ w Δ(u), as `Backend.given`."""
        # A model's first blocks, and so the choice, may be on another device.
        if choice.device.type != "cpu" or (dtypes := _direct(u, y)) is None:
            return None
        if (calls := self._calls.get(choice.k)) is None:
            calls = self._calls[choice.k] = _SiteCalls(_mixing_site(self.stack, choice.k), self.stack)
        return calls.run(u, y, into_y, choice.at, dtypes, choice.tokens)


def given(stack: Stack, layer: Layer | None = None) -> CpuGivenMix | None:
    """`mix` for choices that are made elsewhere, prepared for one module; None for what the kernel can't do alone."""
    if stack.embedding or not stack.low_rank_only or obstacle(stack.A, stack.B, stack) is not None:
        return None
    return CpuGivenMix(stack)


def routed_update(
    u: Tensor, y: Tensor, gates: Sequence[Tensor], rows: Sequence[Tensor], top_k: int
) -> Tensor:
    """What the operator phatgoose::routed_update does on CPUs."""
    tokens = _check_operands(u, y, rows)
    exact, codes, facts = gates
    d, experts = rows[0].shape[1], rows[3].shape[0]
    blocks = -(-experts // LANES)
    check_is("gates", exact, torch.float32, experts, d)
    check_is("codes", codes, torch.int8, blocks, d, LANES)
    check_is("facts", facts, torch.float32, 3, blocks * LANES)
    if top_k < 1:
        raise RoutingError(f"at least 1 expert must be chosen, and top_k is {top_k}.")
    return _run(_site(rows, top_k, gates), u, y, tokens)


def routed_mix(u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """What the operator phatgoose::routed_mix does on CPUs."""
    tokens = _check_operands(u, y, rows)
    check_choice(chosen, weights, tokens)
    chosen, weights = chosen.contiguous(), weights.float().contiguous()
    return _run(_site(rows, chosen.shape[1]), u, y, tokens, chosen, weights)


def _check_operands(u: Tensor, y: Tensor, rows: Sequence[Tensor]) -> int:
    """The number of tokens. Raises RoutingError for what the operator doesn't take.

    Where experts' rows begin isn't checked: it would have to be read in every call.
    """
    a, b, owners, scales = rows
    tokens = tokens_of(u, y, a.shape[-1], b.shape[-1])
    if (u.dtype, y.dtype) not in _DTYPE_CODES or a.dtype not in DTYPES:
        raise RoutingError(f"the CPU kernel computes in float32 and bfloat16, not in {a.dtype} on {u.dtype}.")
    check_is("a", a, a.dtype, a.shape[0], u.shape[-1])
    check_is("b", b, a.dtype, a.shape[0], y.shape[-1])
    check_is("owners", owners, torch.int32, 2, scales.shape[0])
    check_is("scales", scales, torch.float32, scales.shape[0])
    return tokens
