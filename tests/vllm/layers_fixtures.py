"""A transformers Llama cut into the linear layers that vLLM would make of it, on any rank;
written without the plugin's own slicing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from phatgoose.vllm.slices import Linear

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def linears(model, rank, ranks):
    """(the layer, its weight, the modules in it) of every linear layer of one rank."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    copies = max(1, ranks // config.num_key_value_heads)
    for i, layer in enumerate(model.model.layers):
        attention, mlp, at = layer.self_attn, layer.mlp, f"model.layers.{i}"
        q = attention.q_proj.weight.chunk(ranks)[rank]
        kv_ranks = min(ranks, config.num_key_value_heads)
        k, v = (m.weight.chunk(kv_ranks)[rank // copies] for m in (attention.k_proj, attention.v_proj))
        assert len(k) % size == 0
        d = config.hidden_size
        yield (
            Linear(
                f"{at}.self_attn.qkv_proj", d, rank, ranks, d, (len(q), len(k), len(v)), (1, copies, copies)
            ),
            torch.cat([q, k, v]),
            [attention.q_proj, attention.k_proj, attention.v_proj],
        )
        o = attention.o_proj.weight.chunk(ranks, 1)[rank]
        yield Linear(f"{at}.self_attn.o_proj", d, rank, ranks, o.shape[1], (d,), (1,)), o, [attention.o_proj]
        parts = [m.weight.chunk(ranks)[rank] for m in (mlp.gate_proj, mlp.up_proj)]
        sizes = (len(parts[0]), len(parts[1]))
        yield (
            Linear(f"{at}.mlp.gate_up_proj", d, rank, ranks, d, sizes, (1, 1)),
            torch.cat(parts),
            [mlp.gate_proj, mlp.up_proj],
        )
        down = mlp.down_proj.weight.chunk(ranks, 1)[rank]
        wide = mlp.down_proj.weight.shape[1]
        yield (
            Linear(f"{at}.mlp.down_proj", wide, rank, ranks, down.shape[1], (d,), (1,)),
            down,
            [mlp.down_proj],
        )


class Ranks:
    """Ranks of tensor parallelism as threads, which wait for each other in `all_reduce`."""

    def __init__(self, ranks):
        self.ranks, self._barrier, self._given = ranks, threading.Barrier(ranks, timeout=60), [None] * ranks

    def all_reduce(self, rank):
        def reduce(tensor):
            self._given[rank] = tensor
            self._barrier.wait()
            total = sum(self._given)
            self._barrier.wait()
            return total

        return reduce

    def run(self, calls):
        with ThreadPoolExecutor(self.ranks) as pool, torch.no_grad():
            return [f.result() for f in [pool.submit(torch.no_grad()(call)) for call in calls]]
