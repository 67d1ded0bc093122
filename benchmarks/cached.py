"""Pools larger than the device: cache hits and bytes copied, by the budget of device memory.

    python benchmarks/cached.py [--experts 166] [--layers 30] [--shares 0.1 0.25 0.5 1] [--out RESULT.json]

The counts are the same on every device; the milliseconds are this machine's, where the CPU is both host and
device. The base, experts and tokens are random, so nearly all choices differ: the worst case for a cache. A
share is of the pool's bytes, beside what is always in memory.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import bench_models as models
import torch
from bench_machine import machine, options_parser

from phatgoose.models.attach.attach import cache_use, route

STEPS = ((models.DECODE_1, 20), (models.DECODE_8, 10), (models.Step("prefill 128", 1, 128), 3))


def measure(model: Any, pool: Any, share: float, resident: int, whole: int) -> list[dict[str, Any]]:
    """One row a step; what was there before its first round is not counted."""
    route(
        model, pool, device_memory=resident + max(1, int(share * whole)), backend_name="torch", any_base=True
    )
    found = []
    with torch.inference_mode():
        for step, rounds in STEPS:
            run = models.runner(model, step)
            run(0)
            before, times = cache_use(model), []
            for number in range(1, rounds + 1):
                start = time.perf_counter()
                run(number)
                times.append(time.perf_counter() - start)
            after = cache_use(model)
            row: dict[str, Any] = {
                "step": step.name,
                "share": share,
                "milliseconds": 1e3 * statistics.median(times),
            }
            for name in ("experts", "gates"):
                b, a = getattr(before, name), getattr(after, name)
                hits, misses = a.hits - b.hits, a.misses - b.misses
                row[name] = {
                    "needed": (hits + misses) / rounds / len(model._phatgoose_routing.sites),
                    "hits": hits / max(1, hits + misses),
                    "megabytes_copied": (a.bytes_copied - b.bytes_copied) / rounds / 1e6,
                }
            found.append(row)
            e, g = row["experts"], row["gates"]
            print(
                f"{share:5.2f}  {step.name:16} {row['milliseconds']:8.1f} ms   experts a module "
                f"{e['needed']:6.1f}, there {e['hits']:4.0%}, {e['megabytes_copied']:8.2f} MB a step   "
                f"float32 gates {g['needed']:6.1f}, there {g['hits']:4.0%}, {g['megabytes_copied']:7.2f} MB",
                flush=True,
            )
    return found


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--experts", type=int, default=166)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = models.base_model(options.layers)
    pool = models.random_pool(model, options.experts, options.rank)
    route(model, pool, device_memory="1TB", backend_name="torch", any_base=True)
    use = cache_use(model)
    print(
        f"always there {use.resident_bytes / 1e6:.1f} MB, experts and float32 gates {use.pool_bytes / 1e6:.1f} MB"
    )
    rows = [
        r for share in options.shares for r in measure(model, pool, share, use.resident_bytes, use.pool_bytes)
    ]
    if options.out is not None:
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        options.out.write_text(json.dumps({"machine": machine(), **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
