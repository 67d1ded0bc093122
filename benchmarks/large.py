"""Pools larger than memory: thousands of random experts of SmolLM2-135M's shape, packed, mapped and routed.

    python benchmarks/large.py --experts 2000 --work FOLDER [--rank 16] [--modules NAME …] [--out RESULT.json]
    python benchmarks/large.py --experts 10000 --rank 4 --modules q_proj v_proj --work FOLDER

Writes the experts to FOLDER (2,000 of rank 16 at all linear layers take 21 GB, twice that for a moment), packs them, opens and routes
them in a process of its own, and removes them. Decode and prefill are medians of steps that take turns with the base's: with new tokens in every
round, which need experts that nobody has used yet, so their pages come from the disk, and again with the same tokens, whose pages are
in memory. At some modules the choice and the output are held to the formulas in float64.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_models as models
import torch
from bench_machine import machine, medians
from packed import memory, model_of, random_expert
from torch import Tensor

STEPS = ((models.DECODE_1, 40), (models.DECODE_8, 20), (models.Step("prefill 128", 1, 128), 5))
CHECKED_MODULES = 6


def write(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A packed pool on disk, and how long it took."""
    from phatgoose.experts.manifest import new_manifest, place_expert
    from phatgoose.experts.packing import pack
    from phatgoose.files import write_json
    from phatgoose.models.fingerprint import fingerprint

    base = fingerprint(model_of(30), "random-smollm2")
    start, entries = time.perf_counter(), []
    for number in range(options.experts):
        expert = random_expert(number, 30, base.to_json(), options.rank, options.modules)
        entries.append(place_expert(folder, expert, []))
        if number % 100 == 0:
            print(
                f"written: {number} of {options.experts}, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    write_json(folder / "pool.json", new_manifest(entries, base))
    written, start = time.perf_counter() - start, time.perf_counter()
    pack(folder, spare=0.0)
    stacks = next((folder / "packed").iterdir()).stat()
    return {
        "write_seconds": written,
        "pack_seconds": time.perf_counter() - start,
        "file_bytes": stacks.st_size,
    }


def measure(folder: Path) -> dict[str, Any]:
    """Opening, routing and running, in this fresh process."""
    from phatgoose.experts.pool import Pool
    from phatgoose.models.routed import Routing
    from phatgoose.ops import backend
    from phatgoose.routers import PHATGOOSE

    model = models.base_model(30)
    found: dict[str, Any] = {"machine": machine()}
    with torch.inference_mode():
        model(torch.arange(16)[None])
        before = memory()

        def held() -> dict[str, int]:
            now = memory()
            return {k: now[k] - before[k] for k in before}

        start = time.perf_counter()
        pool = Pool.load(folder)
        found["open"] = {"seconds": time.perf_counter() - start, **held()}
        start = time.perf_counter()
        routing = Routing(model, pool, PHATGOOSE(2), backend("auto"))
        found["route"] = {"seconds": time.perf_counter() - start, "copied_at": len(routing.copied), **held()}
        found["steps"] = []
        for step, rounds in STEPS:
            run, firsts = models.runner(model, step), []
            ways = {"base": run, "new tokens": _noting_first(run, firsts), "again": run}
            ready: dict[str, Callable[[], object]] = {
                "base": routing.detach,
                "new tokens": routing.attach,
                "again": lambda: None,  # still attached
            }
            times = medians(ways, rounds, ready)
            routing.detach()
            found["steps"].append(
                {
                    "step": step.name, "rounds": rounds, "first_seconds": firsts[0], **models.beside_base(times), **held(),
                }
            )  # fmt: skip
        found["agrees"] = agrees(model, pool, routing)
    return found


def _noting_first(run: Callable[[int], Tensor], firsts: list[float]) -> Callable[[int], Tensor]:
    def timed(number: int) -> Tensor:
        start = time.perf_counter()
        out = run(number)
        firsts.append(time.perf_counter() - start)
        return out

    return timed


def agrees(model: torch.nn.Module, pool: Any, routing: Any) -> dict[str, Any]:
    """The routed modules' choices and outputs against the formulas in float64, for 8 tokens at some modules."""
    from phatgoose.ops.reference import choose, gate_scores, standardise

    seen: dict[str, tuple[Tensor, Tensor]] = {}
    routing.attach()
    sites = routing.sites[:: max(1, len(routing.sites) // CHECKED_MODULES)]
    handles = [
        site.module.register_forward_hook(
            lambda m, args, out, p=site.path: seen.__setitem__(p, (args[0], out))
        )
        for site in sites
    ]  # registered after the routing's, so they see what it made of the output
    model(torch.arange(100, 108)[None])
    for handle in handles:
        handle.remove()
    routing.detach()
    worst, ties = 0.0, 0
    for site in sites:
        u, got = (t.reshape(-1, t.shape[-1]) for t in seen[site.path])
        gates = standardise(torch.stack([e.gates[site.path] for e in pool.experts]).double())
        scores = gate_scores(u.double(), gates)
        leaders = scores.topk(3, 1).values
        ties += int((leaders[:, 1] - leaders[:, 2] < 1e-4).sum())
        chosen, weights = choose(scores, 2)
        wanted = torch.nn.functional.linear(u.double(), site.module.weight.double())
        for t in range(u.shape[0]):
            for w, e in zip(weights[t], chosen[t].tolist(), strict=True):
                a, b = (
                    pool.experts[e].tensors[f"base_model.model.{site.path}.{p}.weight"].double()
                    for p in ("lora_A", "lora_B")
                )
                wanted[t] += w * (b @ (a @ u[t].double()))
        worst = max(worst, float((got.double() - wanted).norm() / wanted.norm()))
    return {"modules": len(sites), "tokens": 8, "near_ties": ties, "worst_relative_error": worst}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", nargs="*", default=[], help="names of linear layers; all if not given")
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for twice the pool")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    work = Path(tempfile.mkdtemp(prefix="large-", dir=options.work))
    try:
        result = {
            "experts": options.experts,
            "rank": options.rank,
            "modules": options.modules or "all",
            **write(work / "pool", options),
        }
        command = [sys.executable, __file__, "--measure", str(work / "pool"), "--work", str(work)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result |= json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(work)
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
