"""Whole models on a GPU: a base of Llama-3-8B's shape, eagerly and in CUDA graphs, routed and not.

bench.py calls it if torch finds a GPU. Each contestant is captured as a graph of its own. One that can't be
captured, since it waits for the GPU, is measured eagerly only, and the results say so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import bench_models as models
import torch
from bench_machine import medians
from torch import Tensor, nn
from transformers import DynamicCache

STEPS = (
    models.DECODE_1,
    models.DECODE_8,
    models.Step("decode, batch 64", 64, 1),
    models.Step("prefill 4096", 1, 4096),
)
WAYS = ("triton", "torch")


def measure(
    experts: int, rank: int, ways: tuple[str, ...] = WAYS, quick: bool = False, device: str = "cuda"
) -> list[dict[str, object]]:
    """One row a step: medians in milliseconds, eagerly and in graphs, ratios to the base, and the floors."""
    model = models.base_model(2 if quick else 32, "tiny" if quick else "llama-3-8b", device)
    contestants = models.Ways(model, models.random_pool(model, experts, rank), ["base", *ways])
    found = []
    for step in STEPS[:2] if quick else STEPS:
        row = _row(contestants, step, 2 if quick else 30 if step.length == 1 else 10)
        found.append(row)
        floor = row["byte_floor"] if step.length == 1 else row["flop_floor"]
        for kind in ("eager", "graph"):
            ratios = "  ".join(f"{n} {r:.2f}" for n, r in row[kind]["ratio"].items())
            base = row[kind]["milliseconds"].get("base", float("nan"))
            print(
                f"{experts:5} experts  {step.name:16} {kind:5} base {base:8.2f} ms  × base: {ratios}  floor {floor:.2f}"
                f"  distinct {row['distinct_experts']:.0f}",
                flush=True,
            )
    return found


class Forward:
    """One step of the model on tokens in a fixed buffer, as a graph needs them."""

    def __init__(self, model: nn.Module, step: models.Step, device: str):
        generator = torch.Generator().manual_seed(2)
        size = model.config.vocab_size
        self.model, self.step = model, step
        self.all = torch.randint(0, size, (16, step.batch, step.length), generator=generator).to(device)
        self.ids = self.all[0].clone()
        self.cache = None
        if step.length == 1:
            self.cache = DynamicCache(config=model.config)
            past = torch.randint(0, size, (step.batch, models.PAST), generator=generator).to(device)
            model(past, past_key_values=self.cache, use_cache=True)

    def choose(self, number: int) -> None:
        self.ids.copy_(self.all[number % 16])

    def __call__(self) -> Tensor:
        if self.cache is None:
            return self.model(self.ids, use_cache=False, logits_to_keep=1).logits
        logits = self.model(self.ids, past_key_values=self.cache, use_cache=True).logits
        self.cache.crop(-1)
        return logits


def _row(ways: models.Ways, step: models.Step, rounds: int) -> dict[str, object]:
    device = next(ways.model.parameters()).device
    with torch.inference_mode():
        ways.detach()
        forward = Forward(ways.model, step, device)

        def run(number: int) -> None:
            forward.choose(number)
            forward()

        eager = medians(
            dict.fromkeys(ways.names, run), rounds, {n: (lambda n=n: ways.attach(n)) for n in ways.names}
        )
        captured, refused = {}, {}
        for name in ways.names:
            ways.attach(name)
            try:
                captured[name] = _graph(forward)
            except RuntimeError as error:  # torch's, about operations that a capture doesn't allow
                refused[name] = str(error).splitlines()[0]
            ways.detach()
        graph = medians(captured, rounds)
        distinct = models.distinct_experts(ways, run)
        read = models.weights_read(ways.model, run)
    del captured
    gc.collect()
    return {
        "step": step.name,
        "tokens": step.tokens,
        "experts": len(ways.pool.experts),
        "rounds": rounds,
        "eager": models.beside_base(eager),
        "graph": {**models.beside_base(graph), "refused": refused},
        **models.cost(ways, distinct, read, step.batch),
    }


def _graph(forward: Forward) -> Callable[[int], None]:
    """The step as a CUDA graph; Triton and cuBLAS have done the work of their first call before."""
    if not torch.cuda.is_available():
        raise RuntimeError("there are no CUDA graphs without a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()

    def replay(number: int) -> None:
        forward.choose(number)
        graph.replay()

    return replay
