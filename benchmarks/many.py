"""Gander on pools of up to 10,000 experts of SmolLM2-135M's shape: opening, memory, and steps beside the base's.

    python benchmarks/many.py [--experts 24 166 1000 10000] [--rank 16] [--out RESULT.json]
    python benchmarks/many.py --experts 10000 --routers gander gander:directions=4
    python benchmarks/many.py --smoke

Each size has a process of its own, in which base, Gander and PHATGOOSE take turns at every step. Experts adapt all
linear layers. At the modules that Gander reads, each has values of its own. Behind them, experts share the values of a
few (--values): a sequence reads the rows of one expert at each module, so times are the same, and 10,000 of rank 16
would take 98 GB. Their gates are shared as well. PHATGOOSE is left out where the scoring copies of its gates would take
more than half of the free memory. Memory is that of the process beyond the base and the pool's tensors. How long a pool
of thousands takes to be read from files is measured by benchmarks/large.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_models as models
import torch
from bench_machine import in_new_process, machine, options_parser, report
from packed import memory
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from phatgoose.experts.expert import Expert
from phatgoose.experts.packed.expert import PackedRows
from phatgoose.experts.placed import placed_expert
from phatgoose.experts.pool import Pool
from phatgoose.memory import available_bytes
from phatgoose.models.attach.attach import Routing
from phatgoose.models.context.memory import MemoryLayer
from phatgoose.ops.update import Update
from phatgoose.routers import Gander, parse_router

STEPS = ((models.DECODE_1, 20), (models.DECODE_8, 10), (models.PREFILL, 4))
PASSAGES, PIECES = 96, 8
"""Rows of 64 tokens that `route` shows a router: of plain text, and about as many of the reference text."""


@dataclass(frozen=True)
class Stacks:
    """The rows of a pool's experts: A and B transposed, by module path. Expert e has its own, or those of e modulo so
    many."""

    rows: dict[str, tuple[Tensor, Tensor]]
    rank: int

    def starts(self, path: str, experts: int) -> tuple[int, ...]:
        count = len(self.rows[path][0]) // self.rank
        return tuple(expert % count * self.rank for expert in range(experts))

    def of(self, path: str, expert: int) -> tuple[Tensor, Tensor]:
        a, b = self.rows[path]
        start = expert * self.rank % len(a)
        return a[start : start + self.rank], b[start : start + self.rank].T


class SharedPool(Pool):
    """A pool whose rows are used where they are, as those of a packed pool's file are."""

    def __init__(self, experts: Sequence[Expert], stacks: Stacks):
        super().__init__(experts)
        object.__setattr__(self, "stacks", stacks)

    def rows(self, path: str, dtype: torch.dtype) -> tuple[PackedRows | None, str]:
        return PackedRows(*self.stacks.rows[path], self.stacks.starts(path, len(self)), 0), ""


def many_pool(model: PreTrainedModel, experts: int, rank: int, values: int) -> SharedPool:
    """Experts of random values at every linear layer, of which only `values` differ where Gander doesn't read."""
    generator = torch.Generator().manual_seed(1)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    blocks = model.config.num_hidden_layers
    read = {f"model.layers.{block}.self_attn.v_proj" for block in range(max(1, -(-blocks // 6)))}
    values = min(values, experts)

    def random(rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    counts = {path: (experts if path in read else values) * rank for path in modules}
    rows = {
        p: (random(counts[p], m.in_features), random(counts[p], m.out_features)) for p, m in modules.items()
    }
    stacks = Stacks(rows, rank)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": sorted({n.rpartition(".")[2] for n in modules}),
    }  # fmt: skip
    parsed = []
    for number in range(values):
        tensors, gates = {}, {}
        for path, module in modules.items():
            for part, tensor in zip("AB", stacks.of(path, number), strict=True):
                tensors[f"base_model.model.{path}.lora_{part}.weight"] = tensor
            gates[path] = torch.randn(module.in_features, generator=generator)
        parsed.append(Expert(f"e{number}", config, tensors, gates))
    return SharedPool([_another(parsed[e % values], e, read, stacks) for e in range(experts)], stacks)


def _another(parsed: Expert, number: int, read: set[str], stacks: Stacks) -> Expert:
    """An expert with other values at the modules that are read. It isn't parsed again, which would take minutes."""
    own = {path: Update(*stacks.of(path, number)) for path in parsed.updates if path in read}
    found = placed_expert(parsed, {**parsed.updates, **own})
    vars(found).update(name=f"e{number}", sizes=parsed.sizes)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One size, in this process."""
    model = models.base_model(options.blocks, options.shape)
    with torch.inference_mode():
        model(torch.arange(16)[None])
        pool = many_pool(model, options.experts[0], options.rank, options.values)
        gate_bytes = sum(d_in for d_in, _, _ in pool.experts[0].sizes.values()) * len(pool) * 5
        fits = gate_bytes * 2 < available_bytes()
        before, opened, made = memory()["RssAnon"], {}, {}
        for text in options.routers:
            router, start = parse_router(text), time.perf_counter()
            first = next(iter(made.values()), None)
            routing = Routing(model, pool, router) if first is None else models.sharing(first, "auto", router)
            bound, held = time.perf_counter() - start, memory()["RssAnon"]
            seconds = models.observe_random(routing, *options.passages)
            opened[text] = {
                "seconds": {"modules_and_directions" if first is None else "directions": bound, **seconds},
                "bytes_held": memory()["RssAnon"] - before,
                "bytes_bound": held - before,
            }
            before, made[text] = memory()["RssAnon"], routing
        names = ["base", *options.routers, *(["cpu"] if fits else [])]
        start = time.perf_counter()
        ways = models.Ways(model, pool, names, made)
        phatgoose = {"seconds": time.perf_counter() - start, "bytes_held": memory()["RssAnon"] - before}
        steps = [models.measure(ways, step, options.rounds or rounds) for step, rounds in STEPS]
        state = state_bytes(made[options.routers[0]], model)
    return {
        "experts": len(pool), "rank": options.rank, "values": options.values, "blocks": options.blocks,
        "shape": options.shape, "machine": machine(), "open": opened, "phatgoose": phatgoose if fits else None,
        "gate_bytes": gate_bytes, "state_bytes_of_a_sequence": state, "steps": steps,
        "most_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def state_bytes(routing: Routing, model: PreTrainedModel) -> int:
    """What Gander keeps of a sequence of 512 tokens beside its cache."""
    cache = DynamicCache(config=model.config)
    routing.attach()
    model(torch.arange(512)[None] % 300, past_key_values=cache, use_cache=True, logits_to_keep=1)
    routing.detach()
    layer = next(layer for layer in cache.layers if isinstance(layer, MemoryLayer))
    return sum(kept.states.untyped_storage().nbytes() for kept in layer.kept)


def described(found: dict[str, Any]) -> str:
    """A size's results as lines."""
    lines = [f"{found['experts']:6} experts of rank {found['rank']}"]
    for text, one in found["open"].items():
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in one["seconds"].items())
        lines.append(f"  {text}: {seconds}, {one['bytes_held'] / 1e6:.0f} MB")
    if found["phatgoose"] is None:
        lines.append(f"  PHATGOOSE left out: its gates take {found['gate_bytes'] / 1e9:.1f} GB")
    lines.append(f"  a sequence's evidence {found['state_bytes_of_a_sequence'] / 1e6:.2f} MB")
    for step in found["steps"]:
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in step["ratio"].items())
        kind = "byte_floor" if step["step"].startswith("decode") else "flop_floor"
        floors = "  ".join(f"{name} {one[kind]:.2f}" for name, one in step["floors"].items())
        base = step["milliseconds"]["base"]
        lines.append(
            f"  {step['step']:16} base {base:7.1f} ms  × base: {ratios}  floors: {floors}  cpu {step[kind]:.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[24, 166, 1000, 10000])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--routers", nargs="+", default=["gander"], help="settings of Gander to compare")
    parser.add_argument(
        "--values", type=int, default=64, help="experts that differ where Gander doesn't read"
    )
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--shape", choices=list(models.SHAPES), default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=0, help="of each step; 0: 20, 10 and 4")
    parser.add_argument("--smoke", action="store_true", help="a small model and pool, to see that it runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.passages = (PASSAGES, PIECES)
    if not all(isinstance(parse_router(text), Gander) for text in options.routers):
        parser.error("--routers are settings of gander.")
    if options.one:
        print(json.dumps(measure(options)))
        return
    if options.smoke:
        options.blocks, options.shape, options.rank, options.values = 7, "tiny", 2, 4
        options.rounds, options.passages = 1, (4, 2)
    sizes = []
    for experts in [5, 30] if options.smoke else options.experts:
        options.experts = [experts]
        if options.smoke:
            sizes.append(measure(options))
        else:
            given = sys.argv[1:] if arguments is None else list(arguments)
            sizes.append(in_new_process(__file__, *given, "--one", "--experts", experts))
        print(described(sizes[-1]), flush=True)
    report({"sizes": sizes}, options.out)


if __name__ == "__main__":
    main()
