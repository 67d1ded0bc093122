"""What the tests of the compiled kernels share: random problems on a device, and memory that holds nothing usable."""

from __future__ import annotations

import torch

from phatgoose.ops import make_stack, reference
from phatgoose.ops.triton import launch as triton_launch
from phatgoose.ops.update import Update


def problem(
    tokens,
    ranks,
    d_in=48,
    d_out=40,
    dtype=torch.float32,
    weights=None,
    seed=0,
    device: str | torch.device = "cpu",
):
    """Inputs u, outputs y, a stack of updates of these ranks (in dtype `weights`), and their gates."""
    g = torch.Generator().manual_seed(seed)
    parts = [
        Update(torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g), 0.5 + i % 3)
        for i, r in enumerate(ranks)
    ]
    u = (torch.randn(tokens, d_in, generator=g) * 3 + 1).to(device, dtype)
    y = torch.randn(tokens, d_out, generator=g).to(device, dtype)
    gates = reference.standardise(torch.randn(len(ranks), d_in, generator=g).double()).float()
    return u, y, make_stack(parts, d_in, d_out, weights or dtype).to(torch.device(device)), gates.to(device)


def hard_gates(experts, d, seed=0):
    """Gates that 8 bits can't tell apart, gates with outliers, and a candidate of zeros."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(1, d, generator=g) + 1e-4 * torch.randn(experts, d, generator=g)
    raw[: experts // 3] = torch.randn(experts // 3, d, generator=g)
    raw[experts // 3 : experts // 2, 5] = 100.0
    gates = reference.standardise(raw.double()).float()
    gates[-1] = 0
    return gates


def triton_device() -> str:
    """Where Triton's kernels run: interpreted, or on a GPU with TRITON_INTERPRET=0."""
    return "cpu" if triton_launch.kernels().INTERPRETED else "cuda"


def poison_new_memory(monkeypatch) -> None:
    """New memory holds NaN, or numbers that are no expert."""

    def poison(make):
        def made(*args, **kwargs):
            new = make(*args, **kwargs)
            if new.dtype == torch.int8:
                return new
            return new.fill_(torch.nan if new.is_floating_point() else -(2**30))

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def routed_update(ops, u, y, gates, stack, top_k):
    """y + Σ w Δ(u) as a module routes by gates: in one call where the backend has one for this, else step by step."""
    fused = None if ops.fuse is None else ops.fuse(gates, top_k, stack, None)
    if fused is not None and (done := fused(u, y)) is not None:
        return done
    return ops.mix(u, y, stack, *ops.choose(ops.gate_scores(u, gates), top_k), None)
