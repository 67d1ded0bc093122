"""The GPU backend: what the Triton kernels (kernels.py) accept, and how they are called.

They compute in float32, bfloat16 and float16, for inference only, with the results of
`phatgoose.ops.reference`. Nothing here waits for the GPU or asks it for a number, so all of it may be captured
in a CUDA graph, after one call that compiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import fast
from phatgoose.ops.fused import USE_ANOTHER, KernelMix, KernelRouting, kernel_obstacle
from phatgoose.ops.operands import kernel_operands
from phatgoose.ops.stack import Layer, Stack
from phatgoose.ops.triton.launch import kernels, mixed, updated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_FUSED = 64
"""Choices a token that the kernels make themselves. More of them are made by torch, and the kernels mix."""

# Other routers want the scores of every expert. That is one product, which torch does well.
gate_scores, choose = fast.gate_scores, fast.choose

_known: dict[str, tuple[str | None, str]] = {}  # not functools.cache, which torch.compile can't look into


def reason() -> str | None:
    """Why Triton kernels can't be used here; None if they can."""
    return _availability()[0]


def version() -> str:
    """Triton's version, and whether it interprets."""
    import triton

    return f"Triton {triton.__version__}" + (", interpreted" if kernels().INTERPRETED else "")


def _availability() -> tuple[str | None, str]:
    """Why there are no kernels (None: there are), and the type of device that they run on."""
    if "here" not in _known:
        _known["here"] = _probe()
    return _known["here"]


def _probe() -> tuple[str | None, str]:
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
    """Raises RoutingError, with the reason, if Triton kernels can't be used here."""
    if (why := reason()) is not None:
        raise RoutingError(f'the "triton" backend can\'t be used: {why}. {USE_ANOTHER}')


def obstacle(u: Tensor, y: Tensor, stack: Stack) -> str | None:
    """Why the kernels can't do this call, and what to do; None if they can."""
    why, device = _availability()
    if why is not None:
        return f"{why}. {USE_ANOTHER}"
    for tensor in (u, y, stack.A):
        if tensor.device.type != device:
            where = "is interpreted here, on CPUs" if device == "cpu" else "runs on GPUs"
            return f"it {where}, and this is on {tensor.device}. {USE_ANOTHER}"
    return kernel_obstacle(u, y, stack, DTYPES)


def _low_rank(u: Tensor, y: Tensor, stack: Stack, chosen: Tensor, weights: Tensor) -> Tensor:
    if not any(stack.ranks):
        return y
    operands = kernel_operands(stack)
    chosen, weights = chosen.contiguous(), weights.float().contiguous()
    if torch.compiler.is_compiling():
        operator = torch.ops.phatgoose.routed_mix
        done: Tensor = operator(u, y, chosen, weights, operands.tensors, operands.widest)
        return done
    return mixed(operands, u, y, chosen, weights)


mix = KernelMix("triton", obstacle, _low_rank)


class TritonRouting(KernelRouting):
    """Score, choose and mix of one module in a few kernels. Gates go to where the stack is."""

    mixing = mix

    def __call__(self, u: Tensor, y: Tensor, into_y: bool = False) -> Tensor | None:
        """y + Σ w Δ(u), as `FusedRouting.__call__`. Raises RoutingError as `mix`, if `strict`."""
        u = u.to(y.device)  # with offloading it may still be where the last module left it
        if not self.accepts(u, y):
            return None
        if torch.compiler.is_compiling() or type(u) is not Tensor or type(y) is not Tensor:
            return self.as_operator(u, y)
        if not self.plain:
            return self.with_choice(u, y)[0]
        return updated(self.operands, u, y, self.gates, self.top_k, into_y)[0]

    def with_choice(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, who was chosen, int64 [N, k], and their weights, float32 [N, k]."""
        out, chosen, weights = updated(self.operands, u, y, self.gates, self.top_k)
        return fast.with_others(out, u, y, self.stack, chosen, weights, self.layer), chosen, weights


def fuse(
    gates: Tensor, top_k: int, stack: Stack, layer: Layer | None = None, strict: bool = True
) -> TritonRouting | None:
    """The three steps in one call; None for an embedding, and for more choices than the kernels make."""
    if stack.embedding or min(top_k, stack.experts) > MOST_FUSED:
        return None
    return TritonRouting(gates, top_k, stack, layer, strict)
