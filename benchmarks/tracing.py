"""What tracing costs compared with routing alone, on a random base of SmolLM2-135M's shape.

    python benchmarks/tracing.py [--experts 6] [--rounds 15] [--backends cpu torch]

Decoding is 32 tokens one after the other with a key-value cache, of 1 or 8 sequences; reading is 4 × 128
tokens in one forward. The time to sum up at the end of a trace is included. The ways of tracing take turns.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from bench_machine import machine, medians, options_parser
from bench_models import base_model, random_pool
from transformers import DynamicCache, LlamaForCausalLM

from phatgoose.models.attach.attach import route
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE

STEPS = 32
WAYS: dict[str, Callable[[LlamaForCausalLM], AbstractContextManager[object]]] = {
    "off": lambda model: nullcontext(),
    "histogram": lambda model: trace(model, histogram=True),
    "choices": lambda model: trace(model, margins=False),
    "margins": trace,
}


def decoding(model: LlamaForCausalLM, rows: int) -> Callable[[], None]:
    def run() -> None:
        cache, mask = DynamicCache(config=model.config), torch.ones(rows, STEPS + 1, dtype=torch.long)
        for step in range(1, STEPS + 1):
            ids = torch.randint(3, 40000, (rows, 1))
            model(input_ids=ids, attention_mask=mask[:, :step], past_key_values=cache, use_cache=True)

    return run


def reading(model: LlamaForCausalLM) -> Callable[[], None]:
    ids = torch.randint(3, 40000, (4, 128))
    return lambda: model(input_ids=ids, use_cache=False)


def measured(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    model = base_model()
    pool = random_pool(model, options.experts, 16)
    kinds = {"decode 1": decoding(model, 1), "decode 8": decoding(model, 8), "read 4 × 128": reading(model)}
    for backend in options.backends:
        route(model, pool, PHATGOOSE(), backend_name=backend)
        for kind, run in kinds.items():

            def once(number: int, way: str, run: Callable[[], None] = run) -> None:
                torch.manual_seed(number)
                with torch.inference_mode(), WAYS[way](model):
                    run()

            times = medians({way: lambda number, way=way: once(number, way) for way in WAYS}, options.rounds)
            ratio = {way: round(seconds / times["off"], 3) for way, seconds in times.items() if way != "off"}
            yield {"backend": backend, "kind": kind, "milliseconds": 1000 * times["off"], "ratio": ratio}


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backends", nargs="*", default=["cpu", "torch"])
    options = parser.parse_args()
    print(json.dumps(machine()))
    for found in measured(options):
        print(json.dumps(found, ensure_ascii=False), flush=True)
    print(f"load average after: {os.getloadavg()}")


if __name__ == "__main__":
    main()
