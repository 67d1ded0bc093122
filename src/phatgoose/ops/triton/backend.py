"""Routing at one module by Triton kernels (triton_kernels.py): float32, bfloat16 and float16 on a GPU, inference only.

Same signatures and results as `phatgoose.ops.reference`; and `Fused`, which is scores, choice and mix in one call. Nothing here
waits for the GPU or asks it for a number, so all of it may be captured in a CUDA graph, after one call that compiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import fast
from phatgoose.ops.operators import routed_mix, routed_update
from phatgoose.ops.shapes import gates_of
from phatgoose.ops.stack import Layer, Stack
from phatgoose.ops.triton.launch import kernels, mixed, rows_of, updated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_FUSED = 64
"""Choices a token that the kernels make themselves; more of them are torch's, and the kernels mix."""

# Scores of every expert, as other routers want them, are one product, which torch does well.
gate_scores, choose = fast.gate_scores, fast.choose


_known: dict[str, tuple[str | None, str]] = {}


def reason() -> str | None:
    """Why there are no Triton kernels here; None if there are."""
    return _here()[0]


def version() -> str:
    """Triton's version, and whether it interprets."""
    import triton

    return f"Triton {triton.__version__}" + (", interpreted" if kernels().INTERPRETED else "")


def _here() -> tuple[str | None, str]:
    """Why there are none, and the type of device that they run on. Looked up once, in a way that torch.compile can look into."""
    if "here" not in _known:
        _known["here"] = _look()
    return _known["here"]


def _look() -> tuple[str | None, str]:
    try:
        interpreted = bool(kernels().INTERPRETED)
    except ImportError as error:
        return f"Triton can't be imported ({error}); on Linux, pip install triton", "cuda"
    if interpreted:
        return None, "cpu"
    if not torch.cuda.is_available():
        why = "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels without one, to test them)"
        return why, "cuda"
    return None, "cuda"


def require() -> None:
    """Raises RoutingError: there are no Triton kernels here; says why."""
    if (why := reason()) is not None:
        raise RoutingError(f'the "triton" backend can\'t be used: {why}. Use backend "auto" or "torch".')


def obstacle(u: Tensor, y: Tensor, stack: Stack) -> str | None:
    """Why the kernels can't do this call, and what to do; None if they can."""
    why, device = _here()
    if why is not None:
        return f'{why}. Use backend "auto" or "torch".'
    for tensor in (u, y, stack.A):
        if tensor.device.type != device:
            where = "is interpreted here, on CPUs" if device == "cpu" else "runs on GPUs"
            return f'it {where}, and this is on {tensor.device}. Use backend "auto" or "torch".'
    if (why := fast.gradient_refused(u, y)) is not None:
        return why
    if not stack.embedding and not (u.dtype in DTYPES and y.dtype in DTYPES and stack.A.dtype in DTYPES):
        return (
            f"it computes in float32, bfloat16 and float16, not in {stack.A.dtype} on {u.dtype}. "
            'Use backend "auto" or "torch".'
        )
    return None


def _check(u: Tensor, y: Tensor, stack: Stack) -> None:
    if (why := obstacle(u, y, stack)) is not None:
        raise RoutingError(f'the "triton" backend can\'t do this: {why}')


def mix(
    u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor, layer: Layer | None = None
) -> Tensor:
    """y + Σ_j w_j Δ_{e_j}(u): the low-rank part in the kernels, other parts by torch.

    Raises:
        RoutingError: a gradient is asked for, or the tensors are of another device or dtype.
    """
    _check(u, y, stack)
    if chosen.numel() == 0:
        return y
    if stack.embedding:  # columns of A, not rows
        return fast.mix(u, y, stack, chosen, weights, layer)
    added = y
    if any(stack.ranks):
        r = rows_of(stack)
        chosen, weights = chosen.contiguous(), weights.float().contiguous()
        if torch.compiler.is_compiling():
            added = routed_mix(u, y, chosen, weights, r.a, r.b, r.owners, r.scales, r.widest)
        else:
            added = mixed(r, u, y, chosen, weights)
    return fast.with_others(added, u, y, stack, chosen, weights, layer)


class Fused:
    """gate_scores, choose and mix of one module in one call, for a router that is just these. Made once, called often.

    gates: standardised, float32 [E, d_in]; they go to where the stack is.
    """

    def __init__(
        self, gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None, strict: bool = True
    ):
        self.stack, self.layer, self.strict, self.top_k = stack, layer, strict, min(top_k, stack.experts)
        self.gates = gates_of(gates, stack, top_k).to(stack.A.device)

    def __call__(self, u: Tensor, y: Tensor, into_y: bool = False) -> Tensor | None:
        """y + Σ w Δ(u); u: [..., d_in], y: [..., d_out]. With `into_y`, y may be written into and returned.

        None where only another backend can do it and `strict` is off; and while compiling, where `mix` has more to do.

        Raises:
            RoutingError: as `mix`, if `strict`.
        """
        u = u.to(y.device)  # with offloading it may still be where the last module left it
        if not self._fits(u, y):
            return None
        if torch.compiler.is_compiling() or type(u) is not Tensor or type(y) is not Tensor:
            return self._as_operator(u, y) if self.stack.low_rank_only else None
        if not self.stack.low_rank_only:
            return self.with_choice(u, y)[0]
        return updated(rows_of(self.stack), u, y, self.gates, self.top_k, into_y)[0]

    def _fits(self, u: Tensor, y: Tensor) -> bool:
        if self.strict:
            _check(u, y, self.stack)
        return obstacle(u, y, self.stack) is None

    def _as_operator(self, u: Tensor, y: Tensor) -> Tensor:
        r, none = rows_of(self.stack), self.gates.new_empty(0)
        flat_u, flat_y = u.reshape(-1, u.shape[-1]), y.reshape(-1, y.shape[-1])
        return routed_update(
            flat_u, flat_y, self.gates, none, none, r.a, r.b, r.owners, r.scales, self.top_k, r.widest
        ).reshape(y.shape)  # fmt: skip

    def can(self, u: Tensor, y: Tensor) -> bool:
        """Whether this call is one for the kernels and for `with_choice`; always, or an error, if `strict`."""
        return self._fits(u, y) and not torch.compiler.is_compiling() and type(u) is type(y) is Tensor

    def with_choice(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Also who was chosen, int64 [N, k], and their weights, float32 [N, k]."""
        out, chosen, weights = updated(rows_of(self.stack), u, y, self.gates, self.top_k)
        return fast.with_others(out, u, y, self.stack, chosen, weights, self.layer), chosen, weights
