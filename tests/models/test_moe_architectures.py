"""Experts and routers of every mixture that transformers has in its fused form: one adapter routed is PEFT's model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from architectures import make
from conftest import hooked, save_adapter, with_random_adapter
from phatgoose import Expert, Pool, Single, route, unroute

EXPERTS = [
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "phimoe", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "ernie4_5_moe", "granitemoe", "minimax", "nemotron_h", "jamba", "qwen3_next",
    "granitemoehybrid",
]  # fmt: skip
ROUTERS = [*EXPERTS, "llama4_text"]


def _model(name):
    model = make(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    return model


def _check(model, targets, folder):
    assert targets
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=targets)
    generator = torch.Generator().manual_seed(2)
    wrapped = with_random_adapter(model, config, generator)
    save_adapter(wrapped, folder)
    x = torch.randint(3, 320, (2, 9), generator=generator)

    def logits(one):
        with torch.no_grad():
            return one(input_ids=x, use_cache=False).logits

    plain = logits(model)
    route(model, Pool([Expert.from_peft(folder, name="x")]), Single(0))
    torch.testing.assert_close(logits(model), logits(wrapped), atol=2e-5, rtol=1e-4)
    assert (logits(model) - plain).abs().max() > 0.1
    unroute(model)
    assert not hooked(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_pefts(name, tmp_path):
    model = _model(name)
    names = ("gate_up_proj", "up_proj", "down_proj")
    targets = [n for n, p in model.named_parameters() if p.ndim == 3 and n.rpartition(".")[2] in names]
    _check(model, targets, tmp_path / "a")


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_pefts(name, tmp_path):
    model = _model(name)
    targets = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in ("gate", "router")
        and type(module) is not torch.nn.Linear
        and hasattr(module, "weight")
    ]
    _check(model, targets, tmp_path / "a")
