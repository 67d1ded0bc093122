"""Served tokens inside a mixture's experts are those of route(...).generate()."""

from __future__ import annotations

import pytest
import torch
from serving_fixtures import PROMPTS, greedy
from test_engines import served, with_service

from conftest import make_tokenizer
from moe_fixtures import make, peft_adapter, with_gates
from phatgoose import PHATGOOSE, Expert, Pool, Single, Uniform, route, unroute
from phatgoose.models.base.base import Base

ROUTERS = {"phatgoose": PHATGOOSE(), "base": None, "a": Single("a"), "uniform": Uniform()}


@pytest.mark.slow(7)
@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_tokens_inside_experts_are_generates(tmp_path, engine):
    base = Base(make("qwen3_moe"), make_tokenizer(), "qwen3_moe")
    for i, name in enumerate("ab"):
        peft_adapter(base.model, tmp_path / name, i)
    pool = Pool([with_gates(Expert.from_peft(tmp_path / n, name=n), i) for i, n in enumerate("ab")])
    asked = [(prompt, model) for prompt in PROMPTS[:3] for model in ROUTERS]
    found = with_service(base, pool, lambda service: served(service, asked, new=5), engine=engine)
    wanted = []
    for prompt, model in asked:
        if ROUTERS[model] is not None:
            route(base, pool, ROUTERS[model])
        with torch.no_grad():
            wanted.append(greedy(base, prompt, 5))
        unroute(base)
    assert found == wanted
