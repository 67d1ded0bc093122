"""Pad a pool with random experts, as a control: does a router leave them alone?"""

from __future__ import annotations

import torch

from phatgoose.errors import PoolError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool


def padded(pool: Pool, count: int, seed: int = 0) -> Pool:
    """The pool with `count` random experts after its own.

    Each is modelled on one of the pool's experts in turn: every tensor and every gate is drawn from a normal
    distribution with the mean and standard deviation of the original, so that its size doesn't give it away.

    Raises:
        PoolError: `count` is negative, or a name it would use is taken.
    """
    if count < 0:
        raise PoolError(f"{count} experts can't be added to a pool.")
    generator = torch.Generator().manual_seed(seed)

    def random_like(tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.float()
        draw = torch.randn(tensor.shape, generator=generator)
        return (values.mean() + values.std(correction=0) * draw).to(tensor.dtype)

    added = []
    for number in range(count):
        model = pool.experts[number % len(pool.experts)]
        provenance = {"kind": "random", "like": model.name, "seed": seed}
        if model.base is not None:
            provenance["base"] = model.base.to_json()
        gates = (
            None if model.gates is None else {path: random_like(gate) for path, gate in model.gates.items()}
        )
        tensors = {key: random_like(tensor) for key, tensor in model.tensors.items()}
        added.append(Expert(f"random-{number + 1}", model.adapter_config, tensors, gates, provenance))
    return Pool([*pool.experts, *added])
