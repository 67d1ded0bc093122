"""Routing against its base, on this machine: whole models and single layers.

    python benchmarks/bench.py [--experts 4 16 64 166] [--quick] [--out FOLDER]

Prints medians and their ratios to the base of the same run, and the floor: the ratio if only the necessary
bytes were read (or numbers multiplied). Writes everything to benchmarks/results/bench-<date>.json, and a plot
beside it. PEFT's Arrow is slow (half a minute a step at 166 experts), so --arrow turns it on. If torch finds a
GPU, a model of Llama-3-8B's shape is measured on it as well.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import date
from pathlib import Path

import bench_gpu
import bench_layers
import bench_models as models
import torch
from bench_machine import machine, options_parser, read_bandwidth
from bench_plot import plot

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument(
        "--experts", type=int, nargs="*", default=[4, 16, 64, 166], help="pool sizes of whole models"
    )
    parser.add_argument(
        "--ways", nargs="*", default=["cpu", "torch", "dense", "gander"], help="contestants beside the base"
    )
    parser.add_argument("--arrow", action="store_true", help="PEFT's Arrow as well, at the largest pool")
    parser.add_argument("--layers-only", action="store_true", help="single layers, no whole models")
    parser.add_argument("--models-only", action="store_true", help="whole models, no single layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--shape", choices=list(models.SHAPES), default="smollm2-135m", help="whose sizes the base has"
    )
    parser.add_argument(
        "--blocks", type=int, default=30, help="how many blocks; of an encoder–decoder, on either side"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds of a small model, to see that it runs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    record: dict[str, object] = {
        "machine": machine(),
        "shape": options.shape,
        "blocks": options.blocks,
        "models": [],
        "layers": [],
    }
    if not options.layers_only:
        bandwidth = read_bandwidth(64 if options.quick else 1024)
        record["read_bandwidth_gb_s"] = bandwidth / 1e9
        print(f"memory is read at {bandwidth / 1e9:.1f} GB/s by {torch.get_num_threads()} threads")
        for experts in options.experts:
            arrow = ["arrow"] if options.arrow and experts == max(options.experts) else []
            record["models"] += whole_models(experts, [*options.ways, *arrow], options, bandwidth)
    if torch.cuda.is_available() and not options.layers_only:
        record["gpu"] = bench_gpu.measure(max(options.experts), options.rank, quick=options.quick)
    if not options.models_only:
        record["layers"] = bench_layers.measure(options.quick)
    record["load_average_after"] = list(os.getloadavg())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"bench-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    if record["models"]:
        path.with_suffix(".svg").write_text(plot(record["models"]))
    print(f"kept in {path}")


def whole_models(
    experts: int, names: list[str], options: argparse.Namespace, bandwidth: float
) -> list[dict[str, object]]:
    """Every step of one pool size."""
    model = models.base_model(2 if options.quick else options.blocks, options.shape)
    ways = models.Ways(model, models.random_pool(model, experts, options.rank), ["base", *names])
    found = []
    for step, rounds in ((models.DECODE_1, 30), (models.DECODE_8, 20), (models.PREFILL, 5)):
        slow = "arrow" in names and step.tokens > 8
        one = models.measure(ways, step, 1 if options.quick else 2 if slow else rounds)
        one["gb_s"] = {
            n: (one["base_bytes"] + (one["gate_bytes"]["8 bits"] + one["expert_bytes"] if n == "cpu" else 0))
            / t
            / 1e6
            for n, t in one["milliseconds"].items()
            if n in ("base", "cpu") and step.length == 1
        }
        found.append(one)
        kind = "byte_floor" if step.length == 1 else "flop_floor"
        floor = one[kind]
        others = "".join(f", {n} {found[kind]:.2f}" for n, found in one["floors"].items())
        ratios = "  ".join(f"{n} {r:.2f}" for n, r in one["ratio"].items())
        speed = "".join(f", {n} {s:.0f}" for n, s in one["gb_s"].items())
        print(
            f"{experts:5} experts  {step.name:16} base {one['milliseconds']['base']:8.1f} ms  × base: "
            f"{ratios}  floor {floor:.2f}{others}  distinct "
            f"{one['distinct_experts']:.0f}{'  GB/s' + speed[1:] if speed else ''}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
