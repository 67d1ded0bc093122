"""Single linear layers: what routing adds to one, by backend, pool size, tokens, dtype and rank.

Of every shape a dozen layers take turns, so that their weights come from memory, not from a cache, as in a whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_machine import medians
from torch import Tensor

from phatgoose.ops import Stack, backend, fast
from phatgoose.ops.reference import standardise


@dataclass(frozen=True)
class Case:
    """One layer's shape and pool."""

    d_in: int
    d_out: int
    experts: int
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16


CASES = (
    *(Case(576, 1536, experts) for experts in (4, 16, 64, 166, 1000)),
    *(Case(1536, 576, experts) for experts in (4, 166)),
    Case(576, 192, 166),
    *(Case(576, 1536, 166, rank) for rank in (4, 64)),
    Case(576, 1536, 166, dtype=torch.float32),
    Case(2048, 2048, 166),  # T5-XL
    Case(2048, 5120, 166),
)
TOKENS = (1, 8, 64, 512, 4096)
BUDGET = 1.5e9
"""Bytes of all layers of a case together."""


@dataclass(frozen=True, eq=False)
class Layer:
    weight: Tensor
    gates: Tensor
    stack: Stack


def layers_of(case: Case) -> list[Layer]:
    rows = case.experts * case.rank
    each = rows * (case.d_in + case.d_out) * case.dtype.itemsize
    made = []
    for _ in range(max(1, min(12, int(BUDGET / each)))):
        a, b = (torch.empty(rows, d, dtype=case.dtype).normal_(0, 0.02) for d in (case.d_in, case.d_out))
        starts = tuple(range(0, rows, case.rank))
        stack = Stack(a, b, starts, (case.rank,) * case.experts, (1.0,) * case.experts)
        weight = torch.randn(case.d_out, case.d_in).div(case.d_in**0.5).to(case.dtype)
        made.append(Layer(weight, standardise(torch.randn(case.experts, case.d_in)), stack))
    return made


def measure(quick: bool = False) -> list[dict[str, object]]:
    """One row a case and number of tokens: microseconds of the layer, and of what each way adds to it."""
    found = []
    print("d_in → d_out  experts rank dtype     tokens   base µs   × base with: cpu  torch  dense")
    for case in CASES[:1] if quick else CASES:
        layers = layers_of(case)
        fused = [backend("cpu").fuse(one.gates, 2, one.stack, None) for one in layers]
        for tokens in TOKENS[:2] if quick else TOKENS:
            rounds = max(3, min(30, 3000 // tokens))
            with torch.inference_mode():
                row = _row(case, layers, fused, tokens, rounds)
            found.append(row)
            ratios = "  ".join(f"{r:5.2f}" for r in row["ratio"].values())
            print(
                f"{case.d_in:4} → {case.d_out:4} {case.experts:9} {case.rank:4} {str(case.dtype)[6:]:9} {tokens:6} "
                f"{row['microseconds']['base']:9.1f}   {ratios}",
                flush=True,
            )
    return found


def _row(case: Case, layers: list[Layer], fused: list, tokens: int, rounds: int) -> dict[str, object]:
    count = len(layers)
    inputs = [torch.randn(tokens, case.d_in).to(case.dtype) for _ in layers]
    outputs = [u @ one.weight.T for u, one in zip(inputs, layers, strict=True)]

    def every(way: Callable[[int], object]) -> Callable[[int], None]:
        def run(number: int) -> None:
            for i in range(count):
                way(i)

        return run

    def by_torch(i: int, mix: Callable[..., Tensor]) -> Tensor:
        chosen, weights = fast.choose(fast.gate_scores(inputs[i], layers[i].gates), 2)
        return mix(inputs[i], outputs[i], layers[i].stack, chosen, weights)

    ways: dict[str, Callable[[int], object]] = {
        "base": every(lambda i: torch.nn.functional.linear(inputs[i], layers[i].weight)),
        "cpu": every(lambda i: fused[i](inputs[i], outputs[i], True)),
        "torch": every(lambda i: by_torch(i, fast.mix)),
    }
    if tokens * case.experts * case.rank <= 3e6:
        ways["dense"] = every(lambda i: by_torch(i, fast.dense))
    times = {name: 1e6 * t / count for name, t in medians(ways, rounds).items()}
    return {
        "d_in": case.d_in,
        "d_out": case.d_out,
        "experts": case.experts,
        "rank": case.rank,
        "dtype": str(case.dtype)[6:],
        "tokens": tokens,
        "layers": count,
        "rounds": rounds,
        "microseconds": times,
        "ratio": {n: 1 + t / times["base"] for n, t in times.items() if n != "base"},
    }
