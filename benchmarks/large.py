"""Pools larger than memory: thousands of random experts of SmolLM2-135M's shape, packed, mapped and routed.

    python benchmarks/large.py --experts 2000 --work FOLDER [--rank 16] [--modules NAME …] [--out RESULT.json]
    python benchmarks/large.py --experts 10000 --rank 4 --modules q_proj v_proj --work FOLDER

Writes the experts to FOLDER (2,000 of rank 16 at all linear layers take 21 GB, twice that for a moment), packs
them, opens and routes them in a process of its own, and removes them. Decode and prefill are medians of steps
that take turns with the base's. They start with no page of the pool's file in memory, or with a token whose
pages are in memory; rows are prefetched, or read when they are touched. At some modules the choice and the
output are compared with the formulas in float64. How long Gander takes to be attached is measured as well; its steps
are in benchmarks/many.py.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_models as models
import torch
from bench_machine import in_new_process, in_work_folder, machine, medians, options_parser, report
from packed import memory, model_of, random_expert
from torch import Tensor

from phatgoose.ops.cpu import backend as cpu

STEPS = ((models.DECODE_1, 20), (models.DECODE_8, 10), (models.Step("prefill 128", 1, 128), 5))
WAYS = {"asked for": True, "by faults": False}
CHECKED_MODULES = 6


def write(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A packed pool on disk, and how long it took."""
    from phatgoose.experts.manifest import new_manifest
    from phatgoose.experts.packed.pack import pack
    from phatgoose.experts.pool import place_expert
    from phatgoose.files import write_json
    from phatgoose.models.base.fingerprint import fingerprint

    base = fingerprint(model_of(options.layers), "random-smollm2")
    start, entries = time.perf_counter(), []
    for number in range(options.experts):
        expert = random_expert(number, options.layers, base.to_json(), options.rank, options.modules)
        entries.append(place_expert(folder, expert, []))
        if number % 100 == 0:
            print(
                f"written: {number} of {options.experts}, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    write_json(folder / "pool.json", new_manifest(entries, base.to_json()))
    written, start = time.perf_counter() - start, time.perf_counter()
    pack(folder, spare=0.0)
    stacks = next((folder / "packed").iterdir()).stat()
    return {
        "write_seconds": written,
        "pack_seconds": time.perf_counter() - start,
        "file_bytes": stacks.st_size,
    }


def measure(folder: Path, layers: int) -> dict[str, Any]:
    """Opening, routing and running, in this fresh process."""
    from phatgoose.experts.pool import Pool
    from phatgoose.models.attach.attach import Routing
    from phatgoose.routers import PHATGOOSE, Gander

    model = models.base_model(layers)
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
        gander = Routing(model, pool, Gander())
        bound = time.perf_counter() - start
        found["route by Gander"] = {"seconds": bound, **models.observe_random(gander, 96, 8), **held()}
        del gander
        start = time.perf_counter()
        routing = Routing(model, pool, PHATGOOSE(2))
        found["route"] = {"seconds": time.perf_counter() - start, "copied_at": len(routing.copied), **held()}
        found["steps"], pages = [], Pages(routing)
        for step, rounds in STEPS:
            run = models.runner(model, step)
            ready: dict[str, Callable[[], object]] = {"base": routing.detach}
            for name, ahead in WAYS.items():
                ready[f"cold, {name}"] = lambda ahead=ahead: pages.prepare(True, ahead)
            times = medians(dict.fromkeys(ready, run), rounds, ready)
            # By themselves: the system favours a process that has just waited for the disk.
            ready = {
                f"again, {name}": lambda ahead=ahead: pages.prepare(False, ahead)
                for name, ahead in WAYS.items()
            }
            times |= medians(dict.fromkeys(ready, lambda _: run(1)), 4 * rounds, ready)  # noqa: B023
            routing.detach()
            found["steps"].append(
                {"step": step.name, "rounds": rounds, **models.beside_base(times), **held()}
            )
        found["agrees"] = agrees(model, pool, routing)
    return found


@dataclass(eq=False)
class Pages:
    """The pool's file in memory, and whether its rows are prefetched."""

    routing: Any

    def __post_init__(self) -> None:
        self.file = self.routing.pool.experts[0].source.file
        for site in self.routing.sites:
            if not site.stack.prefetch:  # a file that memory can hold
                site.stack = replace(site.stack, prefetch=True)
                site.prepare()
        self.asking = [(site.fused.calls.site, site.fused.calls.site.prefetch) for site in self.routing.sites]

    def prepare(self, cold: bool, ahead: bool) -> None:
        """Attaches the routing, with nothing of the file in memory if `cold`."""
        self.routing.attach()
        for struct, place in self.asking:
            struct.prefetch = place if ahead else None
        if cold:
            self.file._map.madvise(mmap.MADV_DONTNEED)  # mapped pages can't be dropped
            handle = os.open(self.file.path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
            cpu.shared_prefetch().epoch += 1  # what was prefetched is gone


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
    ]  # registered after the routing's, so they see the routed output
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
    parser = options_parser(__doc__)
    parser.add_argument("--experts", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--modules", nargs="*", default=[], help="names of linear layers; all if not given")
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for twice the pool")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.layers)))
        return

    def run(pool: Path) -> dict[str, object]:
        settings = {"experts": options.experts, "rank": options.rank, "layers": options.layers}
        result = {**settings, "modules": options.modules or "all", **write(pool, options)}
        layers = ("--layers", options.layers)
        return result | in_new_process(__file__, "--measure", pool, "--work", pool.parent, *layers)

    report(in_work_folder("large", options.work, run), options.out)


if __name__ == "__main__":
    main()
