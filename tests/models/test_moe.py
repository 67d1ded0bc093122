"""Experts of ours inside the experts of a mixture, against PEFT, merged weights and the formula in float64."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
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

from conftest import VOCABULARY, hooked
from phatgoose import Expert, Pool, Single, Uniform, merged, route, unroute
from phatgoose.models.moe_paths import modules_of

D, F_, E = 32, 24, 5
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def make(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_experts_per_tok": 2,
    }  # fmt: skip
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=E, intermediate_size=F_, **common))
    elif family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                num_experts=E, moe_intermediate_size=F_, intermediate_size=48, head_dim=8, **common
            )
        )
    elif family == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(num_experts=E, intermediate_size=F_, **common))
    elif family == "deepseek_v3":
        common["num_key_value_heads"] = 4
        config = DeepseekV3Config(n_routed_experts=4, moe_intermediate_size=F_, intermediate_size=48, n_group=2, topk_group=1,
                                  first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=4,
                                  qk_nope_head_dim=4, v_head_dim=8, **common)  # fmt: skip
        model = DeepseekV3ForCausalLM(config)
    else:
        config = GptOssConfig(num_local_experts=E, intermediate_size=F_, head_dim=8,
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
    paths = fused_experts(model)
    config = LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q_proj"],
            "target_parameters": [
                f"{path}.{name}" for path in paths for name in ("gate_up_proj", "down_proj")
            ],
            **settings,
        }
    )
    wrapped = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


def per_expert(model, family: str, folder, seed: int, rank: int = 4, targets=None):
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
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "target_modules": targets or list(names),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_pefts_model(tmp_path, family):
    model = make(family)
    plain, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = peft_adapter(model, tmp_path / "a", 1)
    expert = Expert.from_peft(tmp_path / "a", name="a")
    experts = {p: u for p, u in expert.updates.items() if ".experts." in p}
    assert {p.rpartition(".")[2] for p in experts} == {"gate_up_proj", "down_proj"}
    route(model, Pool([expert]), Single(0))
    torch.testing.assert_close(logits(model), logits(wrapped), atol=3e-6, rtol=1e-4)
    # PEFT itself, merged by hand: W + ΔW of every expert.
    torch.testing.assert_close(logits(_merged(make(family), expert)), logits(wrapped), atol=3e-6, rtol=1e-4)
    assert (logits(model) - plain).abs().max() > 0.1
    assert list(model.state_dict()) == list(state)
    unroute(model)
    assert torch.equal(logits(model), plain)
    assert not hooked(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def _merged(model, expert: Expert):
    """The model with an expert's ΔW added to its weights."""
    modules = modules_of(model, expert.updates)
    for path, update in expert.updates.items():
        modules[path].weight.add_(update.weight())
    return model


# PEFT compares its patterns with modules, and its own conversion writes one for a parameter.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_adapter_of_transformers_4(tmp_path, family):
    """One linear layer an expert, as old checkpoints named them."""
    model = make(family)
    expert = Expert.from_peft(per_expert(model, family, tmp_path / "a", 1), name="a")
    route(model, Pool([expert]), Single(0))
    torch.testing.assert_close(logits(model), logits(_merged(make(family), expert)), atol=3e-6, rtol=1e-4)
    wrapped = PeftModel.from_pretrained(make(family), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), logits(wrapped), atol=3e-6, rtol=1e-4)


def _by_hand(model, experts, top_k=2):
    """PHATGOOSE inside every expert of a float64 model, token by token, as docs/method.md has it."""

    def at(slot, path, u):  # u: [d]
        y = slot.weight @ u + (0 if slot.bias is None else slot.bias)
        standard = lambda v: (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()  # noqa: E731
        scores = torch.stack(
            [standard(e.gates[path].double()) @ standard(u) / len(u) ** 0.5 for e in experts]
        )
        best = scores.topk(min(top_k, len(experts)))
        for w, e in zip(best.values.softmax(0), best.indices, strict=True):
            update = experts[int(e)].updates[path]
            y = y + w * update.scale * (update.B.double() @ (update.A.double() @ u))
        return y

    for name in fused_experts(model):
        module = model.get_submodule(name)
        paths = {p for e in experts for p in e.updates if p.startswith(name)}
        slots = modules_of(model, paths)

        def forward(hidden, index, weights, module=module, name=name, slots=slots):
            out = torch.zeros_like(hidden)
            for t in range(len(hidden)):
                for j, w in zip(index[t].tolist(), weights[t], strict=True):
                    path = f"{name}.{j}."
                    if f"{path}gate_up_proj" in slots:
                        inner = at(slots[f"{path}gate_up_proj"], f"{path}gate_up_proj", hidden[t])
                    else:
                        inner = torch.cat(
                            [at(slots[path + p], path + p, hidden[t]) for p in ("gate_proj", "up_proj")]
                        )
                    inner = module._apply_gate(inner[None])[0]
                    out[t] += w * at(slots[f"{path}down_proj"], f"{path}down_proj", inner)
            return out

        module.forward = forward
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "old qwen3_moe"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_phatgoose_is_the_formula(tmp_path, family, backend):
    family, old = family.removeprefix("old "), family.startswith("old")
    model = make(family, torch.float64)
    model.set_experts_implementation("eager")  # the others take no float64
    experts = []
    for i in range(3):
        if old:
            per_expert(model, family, tmp_path / str(i), i, rank=2 + i)
        else:
            peft_adapter(model, tmp_path / str(i), i, target_modules=[], r=2 + i, use_rslora=i == 1)
        experts.append(with_gates(Expert.from_peft(tmp_path / str(i), name=str(i)), i))
    wanted = logits(_by_hand(copy.deepcopy(model), experts))
    plain = logits(model)
    route(model, Pool(experts), backend_name=backend)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)
    assert (plain - wanted).abs().max() > 0.05
    # A row's answer doesn't depend on what it is batched with, nor on the cache.
    x = ids()
    torch.testing.assert_close(logits(model, x[:1]), wanted[:1], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        first = model(x[:, :7], use_cache=True)
        rest = model(x[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, wanted[:, 7:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_any_experts_implementation(tmp_path, implementation, dtype):
    model = make("qwen3_moe", dtype)
    wrapped = peft_adapter(model, tmp_path / "a", 1, target_modules=[])
    model.set_experts_implementation(implementation)
    plain = logits(model)
    expert = Expert.from_peft(tmp_path / "a", name="a")
    route(model, Pool([expert]), Single(0))
    tolerance = 3e-6 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model), logits(wrapped), atol=tolerance, rtol=0.05)
    generated = model.generate(ids(), max_new_tokens=4, do_sample=False, num_beams=2)
    assert generated.shape == (2, 15)
    unroute(model)
    assert torch.equal(logits(model), plain)


def test_a_copy_routes_by_itself(tmp_path):
    model = make("mixtral")
    peft_adapter(model, tmp_path / "a", 1)
    route(model, Pool([Expert.from_peft(tmp_path / "a", name="a")]), Single(0))
    wanted = logits(model)
    copied = copy.deepcopy(model)
    unroute(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(copied), wanted)
    unroute(copied)
    assert not hooked(copied)


def test_pools_of_both_kinds_of_layers(tmp_path):
    """Attention by some, experts by others; the average of all is Uniform, also as one merged expert."""
    model = make("qwen3_moe")
    for i in range(2):
        peft_adapter(model, tmp_path / str(i), i, r=2 + i)
    attention = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(model), attention).save_pretrained(tmp_path / "2")
    pool = Pool([Expert.from_peft(tmp_path / str(i), name=str(i)) for i in range(3)])
    wanted = logits(route(model, pool, Uniform()))
    torch.testing.assert_close(
        logits(route(model, Pool([merged(pool)]), Single(0))), wanted, atol=3e-6, rtol=1e-4
    )
    alone = logits(route(model, pool, Single("2")))
    direct = PeftModel.from_pretrained(make("qwen3_moe"), tmp_path / "2").eval()
    torch.testing.assert_close(alone, logits(direct), atol=3e-6, rtol=1e-4)
