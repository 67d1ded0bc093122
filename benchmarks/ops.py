"""The algorithms that the torch backend chooses from, at one linear layer.

    python benchmarks/ops.py [--dtype float32] [--threads 1]

Median microseconds of interleaved runs; layers take turns, so that their weights come from memory. The limits in
phatgoose/ops/fast.py (DENSE_ROWS, DENSE_SHARE, GATHER_TOKENS, LOOP_TOKENS) were set by it; * marks the
algorithm that is chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_layers import Case, layers_of
from bench_machine import medians, options_parser

from phatgoose.ops import fast

WAYS = (fast.dense, fast.gather, fast.grouped, fast.loop)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-out", type=int, default=1536)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    print(
        f"{options.d_in} → {options.d_out}, rank {options.rank}, {options.dtype}, {options.threads} threads, µs"
    )
    print("experts  rows tokens     base   scores   choose " + "".join(f"{way.__name__:>9}" for way in WAYS))
    for experts in (4, 8, 16, 32, 64, 166):
        case = Case(options.d_in, options.d_out, experts, options.rank, dtype)
        layers = layers_of(case)[:4]
        for tokens in (1, 2, 4, 8, 16, 64, 128, 512):
            with torch.inference_mode():
                print(_row(case, layers, tokens), flush=True)


def _row(case: Case, layers: list, tokens: int) -> str:
    u = torch.randn(tokens, case.d_in).to(case.dtype)
    y = torch.randn(tokens, case.d_out).to(case.dtype)
    scores = [fast.gate_scores(u, one.gates) for one in layers]
    choices = [fast.choose(s, 2) for s in scores]
    each: dict[str, Callable[[int], object]] = {
        "base": lambda i: u @ layers[i].weight.T,
        "scores": lambda i: fast.gate_scores(u, layers[i].gates),
        "choose": lambda i: fast.choose(scores[i], 2),
    }
    for way in WAYS:
        slow = (way is fast.gather and tokens > 128) or (
            way is fast.dense and tokens * experts_rows(case) > 1e6
        )
        if not slow:
            each[way.__name__] = lambda i, way=way: way(u, y, layers[i].stack, *choices[i])
    ways = {n: (lambda _, f=f: [f(i) for i in range(len(layers))]) for n, f in each.items()}
    found = {n: 1e6 * t / len(layers) for n, t in medians(ways, max(5, min(20, 600 // tokens))).items()}
    taken = fast.low_rank_method(layers[0].stack, *choices[0][0].shape)
    cells = "".join(f"{found.get(n, float('nan')):9.0f}" for n in ("base", "scores", "choose"))
    for way in WAYS:
        cells += f"{found.get(way.__name__, float('nan')):8.0f}{'*' if way is taken else ' '}"
    return f"{case.experts:7} {experts_rows(case):5} {tokens:6}{cells}"


def experts_rows(case: Case) -> int:
    return case.experts * case.rank


if __name__ == "__main__":
    main()
