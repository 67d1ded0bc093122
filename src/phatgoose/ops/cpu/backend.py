"""Routing at one module by a compiled kernel (kernel/update.cpp): float32 and bfloat16 on a CPU, inference only.

Same signatures and results as `phatgoose.ops.reference`; and `Fused`, which is scores, choice and mix in one call.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.memory import available_bytes
from phatgoose.ops import fast
from phatgoose.ops.cpu.build import library
from phatgoose.ops.cpu.scan import LANES, scan
from phatgoose.ops.operators import routed_update
from phatgoose.ops.shapes import check_choice, check_is, check_stack, gates_of, tokens_of
from phatgoose.ops.stack import Layer, Stack

DTYPES = (torch.float32, torch.bfloat16)
_KINDS = {(u, y): i | j << 1 for i, u in enumerate(DTYPES) for j, y in enumerate(DTYPES)}
_CPU = torch.device("cpu")

# Scores of every expert, as other routers want them, are one product, which torch does well.
gate_scores, choose = fast.gate_scores, fast.choose


class _Ahead(ctypes.Structure):
    """kernel/interface.h's Ahead."""

    _fields_ = (("limit", ctypes.c_int64), ("bytes", ctypes.c_int64), ("epoch", ctypes.c_uint32))


@cache
def _ahead() -> _Ahead:
    """One for all sites: they share the memory. Half of what is free now holds the base and whatever else comes."""
    return _Ahead(available_bytes() // 2, 0, 1)


class _Site(ctypes.Structure):
    """kernel/interface.h's Site."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "experts", "top_k")),
        *((name, ctypes.c_void_p) for name in ("gates", "codes", "step", "sum", "lost")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "starts", "ranks", "scales")),
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ahead", "asked")),
    )
    tensors: tuple[Tensor, ...]
    """What it points into."""


def _site(a: Tensor, b: Tensor, owners: Tensor, scales: Tensor, top_k: int, *by_gates: Tensor) -> _Site:
    """The struct, which points into these tensors and keeps them: they must be contiguous. Hold it while the kernel runs."""
    site = _Site(a.shape[1], b.shape[1], owners.shape[1], top_k, kind=DTYPES.index(a.dtype))
    site.a, site.b, site.scales = a.data_ptr(), b.data_ptr(), scales.data_ptr()
    site.starts, site.ranks = owners[0].data_ptr(), owners[1].data_ptr()
    if by_gates:
        gates, codes, facts = by_gates
        site.gates, site.codes = gates.data_ptr(), codes.data_ptr()
        site.step, site.sum, site.lost = (row.data_ptr() for row in facts)
    site.tensors = (a, b, owners, scales, *by_gates)
    return site


def _ask_ahead(site: _Site, stack: Stack) -> None:
    """Has the kernel ask for rows before it reads them, where they stand in a file that memory may not hold."""
    if stack.prefetch:
        asked = stack.__dict__.setdefault("_known_asked", torch.zeros(stack.experts, dtype=torch.int32))
        site.ahead, site.asked = ctypes.addressof(_ahead()), asked.data_ptr()
        site.tensors = (*site.tensors, asked)


def _tensors(stack: Stack) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel reads of a stack: A, B, int32 [2, E] of starts and ranks, float32 [E] of scales. Kept with the stack."""
    with _LOCK:
        if (known := stack.__dict__.get("_known_tensors")) is None:
            check_stack(stack)
            owners = torch.tensor([stack.starts, stack.ranks], dtype=torch.int32)
            known = (stack.A.contiguous(), stack.B.contiguous(), owners, stack.scale_vector(_CPU))
            stack.__dict__["_known_tensors"] = known
        return known


_SITES: WeakKeyDictionary[Stack, dict[int, _Site]] = (
    WeakKeyDictionary()
)  # not kept in the stack: pointers can't be copied
_LOCK = threading.RLock()
"""Of what is kept with stacks: of two threads that come first, one would put its own in the place of what the other uses."""


def _mixing(stack: Stack, k: int) -> _Site:
    """The struct of this stack that takes k choices made elsewhere."""
    with _LOCK:
        known = _SITES.setdefault(stack, {})
        if k not in known:
            known[k] = _site(*_tensors(stack), k)
            _ask_ahead(known[k], stack)
        return known[k]


def _run(
    site: _Site, u: Tensor, y: Tensor, out: Tensor, chosen: Tensor | None, weights: Tensor | None, n: int
) -> None:
    code = library().run(
        0, ctypes.addressof(site), u.data_ptr(), y.data_ptr(), out.data_ptr(), n,
        None if chosen is None else chosen.data_ptr(), None if weights is None else weights.data_ptr(),
        _KINDS[u.dtype, y.dtype],
    )  # fmt: skip
    if code == 3:
        raise RoutingError(f"an expert was chosen that there isn't: there are {site.experts}.")
    if code:
        raise MemoryError(f"the CPU kernel found no memory for {n} tokens.")


def obstacle(u: Tensor, y: Tensor, stack: Stack) -> str | None:
    """Why the kernel can't do this call, and what to do; None if it can."""
    if not (u.is_cpu and y.is_cpu and stack.A.is_cpu):
        return 'it runs on CPUs only. Use backend "auto" or "torch".'
    if (why := fast.gradient_refused(u, y)) is not None:
        return why
    if not stack.embedding and (
        u.dtype not in DTYPES or y.dtype not in DTYPES or stack.A.dtype not in DTYPES
    ):
        return f'it computes in float32 and bfloat16, not in {stack.A.dtype} on {u.dtype}. Use backend "auto" or "torch".'
    return None


def _check(u: Tensor, y: Tensor, stack: Stack) -> None:
    if (why := obstacle(u, y, stack)) is not None:
        raise RoutingError(f'the "cpu" backend can\'t do this: {why}')


def mix(
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None = None
) -> Tensor:
    """y + Σ_j w_j Δ_{e_j}(u): the low-rank part in the kernel, other parts by torch.

    Raises:
        RoutingError: a gradient is asked for, the tensors are of another device, dtype or shape, or an expert is chosen that there isn't.
    """
    _check(u, y, stack)
    if chosen.numel() == 0:
        return y
    if (
        stack.embedding or torch.compiler.is_compiling()
    ):  # columns of A, not rows; and what a compiler can look into
        return fast.mix(u, y, stack, chosen, weights, layer)
    check_choice(chosen, weights, tokens_of(u, y, stack.A.shape[1], stack.B.shape[1]))
    added = y
    if any(stack.ranks):
        added = torch.empty_like(y, memory_format=torch.contiguous_format)
        chosen, weights = chosen.contiguous(), weights.float().contiguous()
        site = _mixing(stack, chosen.shape[1])
        _run(site, u.contiguous(), y.contiguous(), added, chosen, weights, chosen.shape[0])
    return fast.with_others(added, u, y, stack, chosen, weights, layer)


class Fused:
    """gate_scores, choose and mix of one module in one call, for a router that is just these. Made once, called often.

    gates: standardised, float32 [E, d_in], or what is rounded to that.

    Raises:
        RoutingError: the stack isn't in float32 or bfloat16, or not on a CPU; gates are of another shape; top_k is below 1.
    """

    def __init__(
        self, gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None, strict: bool = True
    ):
        _check(stack.A, stack.B, stack)
        self.gates, self.stack, self.top_k, self.layer, self.strict = (
            gates_of(gates, stack, top_k),
            stack,
            top_k,
            layer,
            strict,
        )
        self.plain = stack.low_rank_only
        self.tensors = (*_tensors(stack), top_k)
        scanned = scan(self.gates)
        self.by_gates = (self.gates, scanned.codes, scanned.facts)
        self._struct = _site(*self.tensors, *self.by_gates)
        _ask_ahead(self._struct, stack)
        self._at = ctypes.addressof(self._struct)
        self._fitting: tuple[torch.Size | None, torch.Size | None, int] = (None, None, 0)
        self.chosen, self._library_run = min(top_k, stack.experts), library().run

    def __reduce__(self) -> Any:  # copies of a model copy its routing; pointers are made anew
        return Fused, (self.gates, self.top_k, self.stack, self.layer, self.strict)

    def __call__(
        self,
        u: Tensor,
        y: Tensor,
        into_y: bool = False,
        choice_at: tuple[int | None, int | None] = (None, None),
    ) -> Tensor | None:
        """y + Σ w Δ(u); u: [..., d_in], y: [..., d_out]. With `into_y`, y may be written into and returned.

        choice_at: addresses to which who was chosen, int64 [N, k], and their weights, float32 [N, k], are written, if the stack is `plain`.

        None where only another backend can do it and `strict` is off.

        Raises:
            RoutingError: as `mix`, if `strict`; u or y is of another shape.
        """
        kinds = _KINDS.get((u.dtype, y.dtype))
        if (
            kinds is None
            or not (u.is_cpu and y.is_cpu)
            or torch.compiler.is_compiling()
            or type(u) is not Tensor
            or type(y) is not Tensor
            or (torch.is_grad_enabled() and (u.requires_grad or y.requires_grad))
        ):
            return self._rare(u, y)
        if not self.plain:
            return self.with_choice(u, y)[0]
        fitting = self._fitting
        if u.shape != fitting[0] or y.shape != fitting[1]:
            fitting = self._fit(u, y)
        if not u.is_contiguous():
            u = u.contiguous()
        if not y.is_contiguous():
            y, into_y = y.contiguous(), True
        out = y if into_y else torch.empty_like(y)
        code = self._library_run(
            0, self._at, u.data_ptr(), y.data_ptr(), out.data_ptr(), fitting[2], *choice_at, kinds
        )  # fmt: skip
        if code:
            raise MemoryError(f"the CPU kernel found no memory for {fitting[2]} tokens.")
        return out

    def _fit(self, u: Tensor, y: Tensor) -> tuple[torch.Size, torch.Size, int]:
        """Both shapes and how many tokens there are, known when the next call's are the same: checks take as long as a small call."""
        n = tokens_of(u, y, self.stack.A.shape[1], self.stack.B.shape[1])
        self._fitting = fitting = (u.shape, y.shape, n)
        return fitting

    def _rare(self, u: Tensor, y: Tensor) -> Tensor | None:
        """While compiling, or where the kernel can't do it."""
        if obstacle(u, y, self.stack) is not None:
            if self.strict:
                _check(u, y, self.stack)
            return None
        if not self.plain:
            return None
        flat_u, flat_y = u.reshape(-1, u.shape[-1]), y.reshape(-1, y.shape[-1])
        a, b, owners, scales, top_k = self.tensors
        done = routed_update(
            flat_u, flat_y, *self.by_gates, a, b, owners, scales, top_k, max(self.stack.ranks)
        )
        return done.reshape(y.shape)

    def can(self, u: Tensor, y: Tensor) -> bool:
        """Whether this call is one for the kernel and for `with_choice`; always, or an error, if `strict`."""
        if obstacle(u, y, self.stack) is not None:
            if self.strict:
                _check(u, y, self.stack)
            return False
        return not torch.compiler.is_compiling() and type(u) is type(y) is Tensor

    def with_choice(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for `u` and `y` of any shape, and who was chosen, int64 [N, k], and their weights, float32 [N, k]."""
        n, k = self._fit(u, y)[2], self.chosen
        chosen, weights = torch.empty(n, k, dtype=torch.int64), torch.empty(n, k, dtype=torch.float32)
        u, y = u.contiguous(), y.contiguous()
        out = torch.empty_like(y)
        _run(self._struct, u, y, out, chosen, weights, n)
        return fast.with_others(out, u, y, self.stack, chosen, weights, self.layer), chosen, weights


def scanned_update(
    u: Tensor,
    y: Tensor,
    by_gates: tuple[Tensor, ...],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    top_k: int,
) -> Tensor:
    """What the operator phatgoose::routed_update does on CPUs."""
    n = _check_operands(u, y, rows)
    gates, codes, facts = by_gates
    d, experts = rows[0].shape[1], rows[3].shape[0]
    blocks = -(-experts // LANES)
    check_is("gates", gates, torch.float32, experts, d)
    check_is("codes", codes, torch.int8, blocks, d, LANES)
    check_is("facts", facts, torch.float32, 3, blocks * LANES)
    if top_k < 1:
        raise RoutingError(f"at least 1 expert must be chosen, and top_k is {top_k}.")
    site = _site(*rows, top_k, *by_gates)
    y = y.contiguous()
    out = torch.empty_like(y)
    _run(site, u.contiguous(), y, out, None, None, n)
    return out


def _check_operands(u: Tensor, y: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor]) -> int:
    """How many tokens there are. Where experts' rows are is not looked at: it would have to be read in every call.

    Raises:
        RoutingError: a tensor isn't what the operator takes.
    """
    a, b, owners, scales = rows
    n = tokens_of(u, y, a.shape[-1], b.shape[-1])
    if (u.dtype, y.dtype) not in _KINDS or a.dtype not in DTYPES:
        raise RoutingError(f"the CPU kernel computes in float32 and bfloat16, not in {a.dtype} on {u.dtype}.")
    check_is("a", a, a.dtype, a.shape[0], u.shape[-1])
    check_is("b", b, a.dtype, a.shape[0], y.shape[-1])
    check_is("owners", owners, torch.int32, 2, scales.shape[0])
    check_is("scales", scales, torch.float32, scales.shape[0])
    return n


def chosen_update(
    u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Tensor:
    """What the operator phatgoose::routed_mix does on CPUs."""
    n = _check_operands(u, y, rows)
    check_choice(chosen, weights, n)
    site = _site(*rows, chosen.shape[1])
    y = y.contiguous()
    out = torch.empty_like(y)
    chosen, weights = chosen.contiguous(), weights.float().contiguous()
    _run(site, u.contiguous(), y, out, chosen, weights, n)
    return out
