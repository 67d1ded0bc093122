"""The average of a pool as one PEFT adapter: the same function as Uniform and as plain PEFT, or refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from phatgoose import Expert, Pool, route
from phatgoose.errors import PoolError
from phatgoose.experts.merge import merged
from phatgoose.routers import Single, Uniform


def written(base, config, folder, seed):
    model = get_peft_model(copy.deepcopy(base.model), config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "ia3_l" in key or "magnitude" in key:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=g))
            elif "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about biases, which are vectors
        model.save_pretrained(folder)
    return Expert.from_peft(folder, name=f"e{seed}")


@torch.no_grad()
def logits(model):
    ids = torch.arange(2, 14).reshape(2, 6)
    return model(input_ids=ids).logits


def ia3(targets, inputs):
    return IA3Config(target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=True)


def lora(targets, **settings):
    return LoraConfig(target_modules=targets, fan_in_fan_out=True, **settings)


@pytest.mark.parametrize(
    "configs",
    [
        (lora(["c_attn", "c_proj"], r=2), lora(["c_attn"], r=3, lora_bias=True), lora(["c_fc"], r=1, use_rslora=True)),
        (lora(["c_attn", "wte"], r=2), lora(["wte"], r=5, lora_alpha=1)),
        (ia3(["c_attn", "c_fc"], []), ia3(["c_attn"], [])),
        (ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), ia3(["mlp.c_proj"], ["mlp.c_proj"])),
    ],
)  # fmt: skip
def test_it_is_uniform_and_plain_peft_agrees(configs, make_base, tmp_path):
    base = make_base("gpt2")
    pool = Pool([written(base, c, tmp_path / f"e{i}", i) for i, c in enumerate(configs)])
    one = merged(pool)
    expected = logits(route(base, pool, Uniform(), backend_name="reference"))
    found = logits(route(base, Pool([one]), Single(0)))
    assert torch.allclose(found, expected, atol=2e-4)
    plain = make_base("gpt2")
    peft = PeftModel.from_pretrained(plain.model, one.save(tmp_path / "merged")).eval()
    assert torch.allclose(logits(peft), expected, atol=2e-4)
    assert not torch.allclose(logits(make_base("gpt2").model), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((lora(["c_attn"]), ia3(["c_attn"], [])), r"kinds \(IA\)³, LoRA"),
        ((lora(["c_attn"]), lora(["c_attn"], use_dora=True)), "kinds DoRA, LoRA"),
        ((ia3(["c_fc"], ["c_fc"]), ia3(["c_fc"], [])), "some its output"),
    ],
)
def test_what_is_no_single_adapter_is_refused(configs, message, make_base, tmp_path):
    base = make_base("gpt2")
    pool = Pool([written(base, c, tmp_path / f"e{i}", i) for i, c in enumerate(configs)])
    with pytest.raises(PoolError, match=message):
        merged(pool)
