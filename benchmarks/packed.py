"""A packed pool of SmolLM2-135M's shape: time to open and route it, and how much of it is in memory.

    python benchmarks/packed.py [--experts 166] [--layers 30] [--work FOLDER] [--out RESULT.json]

Writes random bfloat16 experts of rank 16 with gates at all 7 linear layers of every block (1.6 GB for 166
experts) into a folder that it removes at the end, packs them, and measures every step in a process of its own.
Memory is Linux' RssAnon (what the process allocated) and RssFile (pages of the mapped file that it has
touched), both in bytes above what the process had before.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Collection
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from bench_machine import in_new_process, in_work_folder, options_parser, report
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}


def model_of(layers: int) -> LlamaForCausalLM:
    """A random model of SmolLM2-135M's shape, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def random_expert(
    number: int, layers: int, base: dict[str, object], rank: int = 16, modules: Collection[str] = ()
) -> Expert:
    """One expert of random values, with gates, at the linear layers of these names (all if there are none) of
    every block."""
    from phatgoose.experts.expert import Expert

    generator = torch.Generator().manual_seed(number)
    wanted = {n: s for n, s in SHAPES.items() if not modules or n.rpartition(".")[2] in modules}
    tensors, gates = {}, {}
    for layer in range(layers):
        for name, (d_in, d_out) in wanted.items():
            path = f"model.layers.{layer}.{name}"
            for part, shape in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank))):
                key = f"base_model.model.{path}.{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
            gates[path] = torch.randn(d_in, generator=generator)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({n.rpartition(".")[2] for n in wanted}),
        "bias": "none",
        "inference_mode": True,
    }
    return Expert(f"expert-{number:03}", config, tensors, gates, {"kind": "random", "base": base})


def write_pool(folder: Path, experts: int, layers: int) -> int:
    """A pool of random experts; returns the bytes of their tensors."""
    from phatgoose.experts.manifest import new_manifest
    from phatgoose.experts.pool import place_expert
    from phatgoose.files import write_json
    from phatgoose.models.base.fingerprint import fingerprint

    base = fingerprint(model_of(layers), "random-smollm2")
    found = (random_expert(number, layers, base.to_json()) for number in range(experts))  # one at a time
    entries = [place_expert(folder, expert, []) for expert in found]
    write_json(folder / "pool.json", new_manifest(entries, base.to_json()))
    each = layers * sum(2 * 16 * (d_in + d_out) + 4 * d_in for d_in, d_out in SHAPES.values())
    return each * experts


def memory() -> dict[str, int]:
    """RssAnon and RssFile of this process, in bytes."""
    text = Path("/proc/self/status").read_text().splitlines()
    pairs = dict(line.split(":", 1) for line in text)
    return {name: int(pairs[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def measure_open(folder: str) -> dict[str, object]:
    """Pool.load, in this fresh process; its imports aren't counted."""
    from phatgoose.experts.pool import Pool

    before, start, cpu = memory(), time.perf_counter(), time.process_time()
    pool = Pool.load(folder)
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    after = memory()
    assert len(pool) > 0
    return {**found, **{k: after[k] - before[k] for k in before}}


def measure_route(folder: str, layers: int) -> dict[str, object]:
    """Pool.load, route, one prompt of 16 tokens, then every expert at every module once."""
    from phatgoose.experts.pool import Pool
    from phatgoose.models.attach.attach import route, routing_of

    model = model_of(layers)
    ids = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids)  # what the base itself needs is there before
        before = memory()
        steps: dict[str, object] = {}

        def step(name: str, seconds: float) -> None:
            now = memory()
            steps[name] = {"seconds": seconds, **{k: now[k] - before[k] for k in before}}

        start = time.perf_counter()
        pool = Pool.load(folder)
        step("load", time.perf_counter() - start)
        start = time.perf_counter()
        route(model, pool, any_base=True)
        step("route", time.perf_counter() - start)
        routing = routing_of(model)
        assert routing is not None
        start = time.perf_counter()
        model(ids)
        step("16 tokens", time.perf_counter() - start)
        for site in routing.sites:  # a value of every page, or the sum's own memory would be counted
            for rows in (site.stack.A, site.stack.B):
                rows.view(torch.int16).flatten()[::2048].sum()
        model(ids)
        step("all rows used", 0.0)
    steps["rows copied at"] = len(routing.copied)
    return steps


def pool_options(description: str | None, layers: int) -> argparse.ArgumentParser:
    """Options of a benchmark of a pool of random experts: its size, and where it and the result are written."""
    parser = options_parser(description)
    parser.add_argument("--experts", type=int, default=166)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    return parser


def main() -> None:
    parser = pool_options(__doc__, layers=30)
    parser.add_argument("--step", choices=["open", "route"], default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        folder = str(options.work)
        print(
            json.dumps(
                measure_open(folder) if options.step == "open" else measure_route(folder, options.layers)
            )
        )
        return
    run = partial(measured, experts=options.experts, layers=options.layers)
    report(in_work_folder("packed", options.work, run), options.out)


def measured(folder: Path, experts: int, layers: int) -> dict[str, object]:
    from phatgoose.experts.packed.pack import pack, unpack
    from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder, verify_folder

    def timed(work: object) -> float:
        start = time.perf_counter()
        work()  # type: ignore[operator]
        return time.perf_counter() - start

    tensors = write_pool(folder, experts, layers)
    result: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "experts": experts,
        "layers": layers,
        "tensor_bytes": tensors,
    }
    result["open as folders"] = in_new_process(__file__, "--step", "open", "--work", folder)
    result["pack"] = timed(lambda: pack(folder))
    stacks = next((folder / "packed").iterdir()).stat()
    result["file_bytes"], result["file_bytes_on_disk"] = stacks.st_size, stacks.st_blocks * 512
    result["open packed"] = [in_new_process(__file__, "--step", "open", "--work", folder) for _ in range(3)]
    result["route packed"] = in_new_process(__file__, "--step", "route", "--work", folder, "--layers", layers)
    result["verify"] = timed(lambda: verify_folder(folder))
    new = random_expert(experts, layers, json.loads((folder / "pool.json").read_text())["base"])
    result["add one"] = timed(lambda: add_to_folder(folder, new))
    result["remove one"] = timed(lambda: remove_from_folder(folder, "expert-000"))
    result["unpack"] = timed(lambda: unpack(folder))
    return result


if __name__ == "__main__":
    main()
