"""Routing at one linear layer: each way of mixing against the layer itself, for more and more experts and tokens.

    python benchmarks/ops.py

Median milliseconds of interleaved runs; "× base" is (layer + scores + choice + mix) over the layer alone. The switches in
phatgoose/ops/fast.py (DENSE_ROWS, GATHER_TOKENS) were set by this.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from phatgoose.experts.update import Update
from phatgoose.ops import fast, make_stack, reference


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each function, the functions taking turns so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-out", type=int, default=1536)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    dtype, d_in, d_out, rank = getattr(torch, options.dtype), options.d_in, options.d_out, options.rank
    torch.manual_seed(0)
    weight = torch.randn(d_out, d_in, dtype=dtype)
    print(f"{d_in} → {d_out}, rank {rank}, {options.dtype}, {torch.get_num_threads()} threads, ms")
    print("experts rows tokens distinct    base  scores  choose   dense  gather grouped  × base")
    for experts in (6, 16, 64, 166):
        parts = [Update(torch.randn(rank, d_in) / 50, torch.randn(d_out, rank) / 50) for _ in range(experts)]
        stack = make_stack(parts, d_in, d_out, dtype)
        gates = reference.standardise(torch.randn(experts, d_in))
        for tokens in (1, 8, 64, 512):
            u = torch.randn(tokens, d_in, dtype=dtype)
            y = u @ weight.T
            scores = fast.gate_scores(u, gates)
            chosen, weights = fast.choose(scores, 2)
            ways: dict[str, Callable[[], object]] = {
                "base": lambda u=u: u @ weight.T,
                "scores": lambda u=u, gates=gates: fast.gate_scores(u, gates),
                "choose": lambda scores=scores: fast.choose(scores, 2),
                "mix": lambda u=u, y=y, s=stack, c=chosen, w=weights: fast.mix(u, y, s, c, w),
            }
            for name in ("dense", "gather", "grouped"):
                if name != "gather" or tokens <= 64:
                    way = getattr(fast, f"_{name}")
                    ways[name] = lambda way=way, u=u, y=y, s=stack, c=chosen, w=weights: way(u, y, s, c, w)
            found = medians(ways, options.rounds)
            ratio = (found["base"] + found["scores"] + found["choose"] + found["mix"]) / found["base"]
            cells = "".join(
                f"{found.get(n, float('nan')):8.3f}"
                for n in ("base", "scores", "choose", "dense", "gather", "grouped")
            )
            print(f"{experts:7} {experts * rank:4} {tokens:6} {chosen.unique().numel():8}{cells}{ratio:8.2f}")


if __name__ == "__main__":
    main()
