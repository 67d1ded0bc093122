"""Pools of every kind of adapter, and what their folders hold."""

from __future__ import annotations

import torch
from peft import IA3Config, LoraConfig

from conftest import TARGETS, save_adapter, with_random_adapter
from phatgoose import Expert, Pool

FILES = {"adapter_config.json", "adapter_model.safetensors", "gates.safetensors", "expert.json", "pool.json"}


def lora(**settings):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS["llama"], **settings})


KINDS = {
    "plain": lambda: lora(),
    "wide": lambda: lora(r=5, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "tall": lambda: lora(r=24),
    "patterns": lambda: lora(rank_pattern={"down_proj": 7, "q_proj": 1}, alpha_pattern={"v_proj": 9}),
    "bias": lambda: lora(lora_bias=True),
    "dora": lambda: lora(use_dora=True, target_modules=["v_proj", "up_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embedding": lambda: lora(target_modules=["embed_tokens", "lm_head", "o_proj"]),
}


def adapter(base, kind, folder, dtype=torch.float32, seed=0, gates=True):
    """One expert of this kind, written by PEFT and read from there."""
    generator = torch.Generator().manual_seed(seed)
    made = with_random_adapter(base.model, KINDS[kind](), generator, 0.15)
    save_adapter(made.to(dtype), folder)
    expert = Expert.from_peft(folder, name=folder.name, provenance={"base": base.fingerprint.to_json()})
    if not gates:
        return expert
    lengths = {p: d_out if embedding else d_in for p, (d_in, d_out, embedding) in expert.sizes.items()}
    sizes = {p: n or dict(base.model.named_modules())[p].in_features for p, n in lengths.items()}
    return expert.with_gates({p: torch.randn(n, generator=generator) for p, n in sizes.items()})


def make_zoo(base, folder):
    """One expert of every kind, one of them in bfloat16 and one without gates."""
    made = [adapter(base, kind, folder / kind, seed=i) for i, kind in enumerate(KINDS)]
    made.append(adapter(base, "plain", folder / "half", torch.bfloat16, seed=20))
    made.append(adapter(base, "plain", folder / "ungated", seed=21, gates=False))
    return made


def make_plain(base, folder):
    """Four LoRA experts of ranks 3, 3, 5 (at some modules) and by pattern."""
    kinds = ("plain", "plain", "wide", "patterns")
    return [adapter(base, k, folder / f"{k}-{i}", seed=i) for i, k in enumerate(kinds)]


def pool_of(experts, folder):
    return Pool(experts).save(folder)
