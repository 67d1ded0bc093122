"""Tiny mixture-of-experts models, adapters inside their experts, and what these compute token by token."""

from __future__ import annotations

import json

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from conftest import VOCABULARY, save_adapter, with_random_adapter
from phatgoose import Expert
from phatgoose.models.moe.names import modules_by_path

D, F_, E = 32, 24, 5
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def make(family: str, dtype: torch.dtype = torch.float32, width: int = F_):
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": None, "num_experts_per_tok": 2,
    }  # fmt: skip
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=E, intermediate_size=width, **common))
    elif family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                num_experts=E, moe_intermediate_size=width, intermediate_size=48, head_dim=8, **common
            )
        )
    elif family == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(num_experts=E, intermediate_size=width, **common))
    elif family == "deepseek_v3":
        common["num_key_value_heads"] = 4
        config = DeepseekV3Config(
            n_routed_experts=4, moe_intermediate_size=width, intermediate_size=48, n_group=2, topk_group=1,
            first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8, **common,
        )  # fmt: skip
        model = DeepseekV3ForCausalLM(config)
    else:
        config = GptOssConfig(num_local_experts=E, intermediate_size=width, head_dim=8,
                              rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **common)  # fmt: skip
        model = GptOssForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    return model.eval().to(dtype)


def ids(rows: int = 2, length: int = 11, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, x=None):
    return model(ids() if x is None else x).logits


def fused_experts(model) -> list[str]:
    return [
        path for path, m in model.named_modules() if hasattr(m, "down_proj") and hasattr(m, "_apply_gate")
    ]


def peft_adapter(model, folder, seed: int, **settings):
    """An adapter of random values that PEFT made and saved; PEFT's model too."""
    names = [f"{path}.{name}" for path in fused_experts(model) for name in ("gate_up_proj", "down_proj")]
    usual = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": names}
    config = LoraConfig(**usual | settings)
    wrapped = with_random_adapter(model, config, torch.Generator().manual_seed(seed))
    save_adapter(wrapped, folder)
    return wrapped


def per_expert(model, family: str, folder, seed: int, rank: int = 4, router: bool = False):
    """An adapter as PEFT saved it with transformers 4, when every expert had linear layers of its own."""
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in fused_experts(model):
        old = path.replace("mlp", "block_sparse_moe") if family == "mixtral" else path
        for j in range(model.get_submodule(path).num_experts):
            for name, d_in, d_out in zip(names, (D, D, F_), (F_, F_, D), strict=True):
                key = f"base_model.model.{old}.{j}.{name}.lora"
                tensors[f"{key}_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.2
                tensors[f"{key}_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.2
        if router:
            key = f"base_model.model.{old.replace('experts', 'gate')}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(rank, D, generator=generator) * 0.2
            count = model.get_submodule(path).num_experts
            tensors[f"{key}_B.weight"] = torch.randn(count, rank, generator=generator) * 0.2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "target_modules": [*names, *(["gate"] if router else [])],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def with_gates(expert: Expert, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return expert.with_gates(
        {p: torch.randn(u.gate_dim, generator=generator) for p, u in expert.updates.items()}
    )


@torch.no_grad()
def with_weights_added(model, expert: Expert):
    """The model with an expert's ΔW added to its weights."""
    modules = modules_by_path(model, expert.updates)
    for path, update in expert.updates.items():
        modules[path].weight.add_(update.weight())
    return model


def change(update, u):
    """Δ(u) of a LoRA for one token [d]."""
    return update.scale * (update.B.to(u.dtype) @ (update.A.to(u.dtype) @ u))


def by_hand(model, experts, at):
    """The model with experts that run token by token; `at(path, slot, u)` is what a layer gives for u [d]."""
    for name in fused_experts(model):
        module = model.get_submodule(name)
        slots = modules_by_path(model, {p for e in experts for p in e.updates if p.startswith(name)})

        def forward(hidden, index, weights, module=module, name=name, slots=slots):
            out = torch.zeros_like(hidden)
            for t in range(len(hidden)):
                for j, w in zip(index[t].tolist(), weights[t], strict=True):
                    layer = lambda part, u, path=f"{name}.{j}.": at(path + part, slots[path + part], u)  # noqa: E731
                    if f"{name}.{j}.gate_up_proj" in slots:
                        inner = layer("gate_up_proj", hidden[t])
                    else:
                        inner = torch.cat([layer(part, hidden[t]) for part in ("gate_proj", "up_proj")])
                    out[t] = out[t] + w * layer("down_proj", module._apply_gate(inner[None])[0])
            return out

        module.forward = forward
    return model
