"""A small task, settings that train in a second, and what it means for a base to be untouched."""

from __future__ import annotations

import copy
import hashlib

from phatgoose.records import Example, Task


def make_task(train: int = 21, validation: int = 5, name: str = "plus") -> Task:
    rows = [
        Example(f"number {i} plus {i % 7}" + " the dog" * (i % 5) + " equals", (f"{i + i % 7}", "x"))
        for i in range(60)
    ]
    return Task(
        name,
        tuple(rows[:train]),
        tuple(rows[train : train + validation]),
        tuple(rows[-9:]),
        {"spec": f"test:{name}"},
    )


SMALL = {"steps": 12, "rows_per_step": 6, "rows_per_batch": 3, "validate_every": 5, "save_every": 3}
LORA = {"rank": 3, "alpha": 6.0}


def state_of(model):
    """Everything about a model that training might leave changed."""
    modules = {
        path: (
            id(m),
            type(m),
            m.training,
            sorted(m.__dict__),
            {k: list(v) for k, v in m.__dict__.items() if isinstance(v, dict)},
        )
        for path, m in model.named_modules()
    }
    tensors = {
        name: (
            id(t),
            t.dtype,
            t.requires_grad,
            t.grad,
            hashlib.sha256(t.detach().float().numpy().tobytes()).hexdigest(),
        )
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    return {
        "modules": modules,
        "tensors": tensors,
        "config": copy.deepcopy(vars(model.config)),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "class": type(model),
    }
