"""Adapters that name a language model's modules in another layout, and experts whose sizes only the model knows."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from architectures import make
from conftest import make_tokenizer, save_adapter, with_random_adapter
from phatgoose import Expert, GateConfig, Pool, Task, route, train_gate, unroute
from phatgoose.errors import RoutingError, TrainingError
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.packed.pack import pack
from phatgoose.experts.placed import placed_expert
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import Base
from phatgoose.ops.update import Projections, SharedUpdate, Update, no_rows
from phatgoose.records import Example
from phatgoose.routers import PHATGOOSE, AverageActivation, Single, Uniform

TEXT, VLM, OLD = "model.", "model.language_model.", "language_model.model."
PREFIX = "base_model.model."


def gemma3():
    """A vision-language model, and its language model alone."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    text = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 16, **ids,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7
    )  # fmt: skip
    whole = Gemma3ForConditionalGeneration(config).eval()
    alone = Gemma3ForCausalLM(whole.config.text_config).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    return whole, alone


@pytest.fixture(scope="module")
def models():
    return gemma3()


def adapter(model, folder, seed=0, targets=("q_proj", "down_proj")):
    """A LoRA of the language model alone, its keys as PEFT writes them there."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(targets))
    return save_adapter(with_random_adapter(model, config, torch.Generator().manual_seed(seed)), folder)


def renamed(folder, layout):
    file = folder / "adapter_model.safetensors"
    tensors = {k.replace(PREFIX + TEXT, PREFIX + layout): t for k, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


@torch.no_grad()
def logits(model):
    ids = torch.randint(8, 320, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


def peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", [TEXT, VLM, OLD])
@pytest.mark.parametrize("base", [0, 1], ids=["in a vision-language model", "alone"])
def test_each_layout_fits_the_language_model_wherever_it_stands(models, base, layout, packed, tmp_path):
    folder = adapter(models[1], tmp_path / "adapter")
    expected = logits(peft(models[1], folder))
    pool = Pool([Expert.from_peft(renamed(folder, layout))])
    if packed:
        pack(pool.save(tmp_path / "pool"))
        pool = Pool.load(tmp_path / "pool")
    plain = logits(models[base])
    found = logits(route(models[base], pool, Single(0)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    here = (VLM, TEXT)[base]
    names = {path: path.replace(layout, here, 1) for path in pool.modules} if layout != here else {}
    assert routing_of(models[base]).renamed == ({"adapter": names} if names else {})
    assert torch.equal(logits(unroute(models[base])), plain)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_experts_of_two_layouts_meet_at_one_module(models, tmp_path):
    """They compete for its tokens by their gates, as experts of one layout do, and data signatures follow."""
    whole = Base(models[0], make_tokenizer(), "vlm")
    experts, generator = [], torch.Generator().manual_seed(3)
    for seed, layout in enumerate((TEXT, VLM, OLD)):
        folder = renamed(adapter(models[1], tmp_path / f"a{seed}", seed), layout)
        made = Expert.from_peft(folder, name=f"e{seed}")
        vectors = {p: torch.randn(u.gate_dim, generator=generator) for p, u in made.updates.items()}
        experts.append(made.with_gates(vectors).with_signature(DataSignature(vectors)))
    alike = []
    for expert, layout in zip(experts, (TEXT, VLM, OLD), strict=True):
        folder = expert.save(tmp_path / "same" / expert.name)
        moved = Expert.from_peft(renamed_from(folder, layout), name=expert.name)
        names = {path.replace(layout, VLM, 1): gate for path, gate in expert.gates.items()}
        alike.append(moved.with_gates(names).with_signature(DataSignature(names)))
    for router in (PHATGOOSE(top_k=2), AverageActivation(top_k=1), Uniform()):
        expected = logits(route(whole, Pool(alike), router))
        assert torch.equal(logits(route(whole, Pool(experts), router)), expected)
    assert len(routing_of(whole).sites) == 4
    unroute(whole)


def renamed_from(folder, layout):
    file = folder / "adapter_model.safetensors"
    save_file(
        {k.replace(PREFIX + layout, PREFIX + VLM): t for k, t in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    for name in ("expert.json", "gates.safetensors", "signature.safetensors"):
        (folder / name).unlink()
    return folder


def test_gates_are_trained_under_the_experts_own_names(models, tmp_path):
    whole = Base(models[0], make_tokenizer(), "vlm")
    expert = Expert.from_peft(renamed(adapter(models[1], tmp_path / "adapter"), OLD))
    rows = tuple(Example(f"say {i}", (("yes", "no")[i % 2],)) for i in range(24))
    config = GateConfig(steps=2, rows_per_step=4, rows_per_batch=4, learning_rate=0.05, validate_every=0)
    gated = train_gate(whole, expert, Task("t", rows[:16], rows[16:20], rows[20:]), config)
    assert gated.gates.keys() == expert.updates.keys()
    route(whole, Pool([Expert.load(gated.save(tmp_path / "gated"))]), PHATGOOSE(top_k=1))
    unroute(whole)


def test_what_isnt_there_or_may_mean_two_modules_is_refused(models, tmp_path):
    folder = renamed(adapter(models[1], tmp_path / "adapter"), "model.vision_tower.vision_model.encoder.")
    with pytest.raises(RoutingError, match=r"adapts a module this model lacks: .*model.vision_tower"):
        route(models[1], Pool([Expert.from_peft(folder)]), Single(0))
    other = renamed(adapter(models[1], tmp_path / "other"), "model.decoder.")
    with pytest.raises(RoutingError, match="adapts a module this model lacks"):
        route(models[0], Pool([Expert.from_peft(other)]), Single(0))
    file = renamed(adapter(models[1], tmp_path / "twice"), VLM) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {k.replace(VLM, OLD): t.clone() for k, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(RoutingError, match=r"adapts model.language_model.*q_proj twice|down_proj twice"):
        route(models[0], Pool([Expert.from_peft(file.parent)]), Single(0))


def test_a_decoder_of_another_architecture_is_not_taken_for_the_language_model(make_base, tmp_path):
    """OPT's layers lie under model.decoder, and its projections have the same names."""
    opt = make("opt")
    expert = Expert.from_peft(adapter(make_base("llama").model, tmp_path / "adapter", targets=["q_proj"]))
    with pytest.raises(RoutingError, match="adapts a module this model lacks"):
        route(opt, Pool([expert]), Single(0))
    with pytest.raises(TrainingError, match="adapts a module this model lacks"):
        train_gate(Base(opt, make_tokenizer(), "opt"), expert, Task("t", (Example("a", ("b",)),), (), ()))


def test_qwen2_vl_as_it_was_before(tmp_path):
    """Its language model lay under model., as a language model alone does.
    (PEFT doesn't apply such keys, without a word.)"""
    torch.manual_seed(0)
    text = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    folder = adapter(model, tmp_path / "adapter", targets=["q_proj", "down_proj"])
    expected = logits(peft(model, folder))
    file = folder / "adapter_model.safetensors"
    save_file({k.replace(VLM, TEXT): t for k, t in load_file(file).items()}, file, {"format": "pt"})
    found = logits(route(model, Pool([Expert.from_peft(folder)]), Single(0)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_veras_matrices_must_fit_into_memory(make_base, tmp_path):
    """A file of a few numbers may ask for any rank."""
    base, rank = make_base("llama"), 2**44
    path = "model.layers.0.self_attn.q_proj"
    update = Update(
        *no_rows(None, 32),
        shared=SharedUpdate(torch.ones(32), torch.ones(1).expand(rank), Projections(seed=0)),
    )
    plain = Expert.from_peft(adapter(base.model, tmp_path / "adapter"))
    with pytest.raises(RoutingError, match=r"VeRA of rank 17592186044416, whose matrices take \d+ bytes"):
        route(base, Pool([placed_expert(plain, {path: update})]), Single(0))


def test_vera_of_another_base_is_refused(make_base, tmp_path):
    base = make_base("llama")
    shared = SharedUpdate(torch.ones(48), torch.ones(3), Projections(torch.ones(3, 20), torch.ones(48, 3)))
    update = Update(*no_rows(None, 48), shared=shared)
    plain = Expert.from_peft(adapter(base.model, tmp_path / "adapter"))
    for path, message in (
        ("model.layers.0.mlp.up_proj", r"vera_A \[3, 20\] .* too small for 32 → 48"),
        ("model.layers.0.self_attn.q_proj", r"an update 0 → 48 at .*q_proj, where this model has 32 → 32"),
        ("model.layers.9.mlp.up_proj", "adapts a module this model lacks"),
    ):
        with pytest.raises(RoutingError, match=message):
            route(base, Pool([placed_expert(plain, {path: update})]), Single(0))
