"""A base's fingerprint must not move with dtype, packing, hooks or placement, and must move with the weights."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import FAMILIES, TARGETS, make_model
from phatgoose.errors import BaseModelError
from phatgoose.fingerprints import check_same_base, same_base
from phatgoose.models.base.fingerprint import architecture, fingerprint, sample_positions
from phatgoose.records import Fingerprint


def print_of(model, spec="tiny"):
    return fingerprint(model, spec)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_the_same_base(family, dtype):
    model = make_model(family, layers=3)
    first = print_of(model)
    second = print_of(copy.deepcopy(model).to(dtype))
    assert first.samples != second.samples
    for a, b in ((first, second), (second, first)):
        verdict = same_base(a, b)
        assert verdict.level == "same"
        assert verdict.compared == ("embedding", "norm", "linear")
    twice = print_of(copy.deepcopy(model).to(torch.bfloat16).to(torch.float16).to(torch.float32))
    assert same_base(first, twice).level == "same"
    assert (
        same_base(print_of(copy.deepcopy(model).bfloat16()), print_of(copy.deepcopy(model).half())).level
        == "same"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_another_checkpoint_is_different(family):
    a, b = print_of(make_model(family, seed=0), "one"), print_of(make_model(family, seed=1), "two")
    assert a.architecture == b.architecture
    verdict = same_base(a, b)
    assert verdict.level == "different"
    with pytest.raises(BaseModelError, match=r"expert 'x'.*'one'.*'two'.*cosine.*load_base\('one'\)"):
        check_same_base(a, b, "expert 'x'", allow_close=True)


@pytest.mark.parametrize("kind", ["embedding", "norm", "linear"])
def test_a_change_in_one_kind_of_weights_shows(kind):
    model = make_model("llama")
    other = copy.deepcopy(model)
    changed = {"embedding": "embed_tokens", "norm": "norm.weight", "linear": "_proj"}[kind]
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if changed in name or (kind == "norm" and "layernorm" in name):
                parameter.mul_(1.02)
    a, b = print_of(model), print_of(other)
    assert {g.partition(":")[0] for g in a.samples if a.samples[g] != b.samples[g]} == {kind}
    verdict = same_base(a, b)
    assert verdict.level == "close"
    assert kind in verdict.reason
    with pytest.raises(BaseModelError, match=r"close, but not the same.*can't be told apart"):
        check_same_base(a, b, "the pool")
    assert check_same_base(a, b, "the pool", allow_close=True) == verdict


def test_small_weights_tell_a_fine_tuned_sibling():
    """A change far below the size of the weights is above a cast's error for the small ones among 400 samples."""
    model = make_model("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 2e-3)  # weights have 0.2
    assert same_base(print_of(model), print_of(other)).level == "close"


def test_architecture_says_the_same_of_every_family():
    found = {family: architecture(make_model(family, layers=3)) for family in FAMILIES}
    assert found["llama"] == {
        "model_type": "llama", "hidden_size": 32, "layers": 3, "decoder_layers": None, "attention_heads": 4,
        "kv_heads": 2, "intermediate_size": 48, "vocab_size": 320, "encoder_decoder": False,
        "tied_embeddings": False,
    }  # fmt: skip
    assert found["qwen"]["tied_embeddings"] is True
    assert found["gpt2"] == found["qwen"] | {"model_type": "gpt2", "kv_heads": 4, "intermediate_size": 128}
    expected = {
        "decoder_layers": 3,
        "encoder_decoder": True,
        "intermediate_size": 48,
        "kv_heads": 4,
        "layers": 3,
    }
    assert found["t5"] | expected == found["t5"]


def test_an_architecture_that_differs_is_named():
    with pytest.raises(BaseModelError, match="layers is 2 expected, 3 found"):
        check_same_base(print_of(make_model("llama")), print_of(make_model("llama", layers=3)), "it")
    with pytest.raises(BaseModelError, match="model_type is 'llama' expected, 'qwen2' found"):
        check_same_base(print_of(make_model("llama")), print_of(make_model("qwen")), "it")


def test_t5_with_a_head_of_its_own_is_not_the_tied_one():
    tied = make_model("t5")
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(torch.randn_like(untied.lm_head.weight))
    assert same_base(print_of(tied), print_of(untied)).reason == (
        "architecture: tied_embeddings is True expected, False found"
    )


def test_the_documented_definition():
    """The places and values of docs/bases.md, computed another way."""
    model = make_model("gpt2")
    weight = model.transformer.wte.weight.detach()
    found = print_of(model)
    for i in (0, 7, 191):
        digest = hashlib.sha256(f"embedding|320x32|{i}".encode()).hexdigest()
        row, column = divmod(int(digest[:16], 16) % (320 * 32), 32)
        assert found.samples["embedding"][i] == pytest.approx(weight[row, column].item(), rel=1e-5)
    assert len(found.samples["embedding"]) == 192
    name = "transformer.h.1.attn.c_attn.weight"
    conv = model.transformer.h[1].attn.c_attn.weight.detach().flatten()  # Conv1D: [in, out]
    assert found.samples[f"linear:{name}"] == pytest.approx(
        [conv[p].item() for p in sample_positions(name, (32, 96), 8)], rel=1e-5
    )
    norms = {g for g in found.samples if g.startswith("norm:")}
    assert norms == {
        f"norm:transformer.{n}.weight" for n in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f")
    }
    assert not any("wte" in g or "lm_head" in g for g in found.samples)


def test_few_values_for_deep_models():
    found = print_of(make_model("t5", layers=12))
    count = {k: sum(len(v) for g, v in found.samples.items() if g.startswith(k)) for k in ("norm", "linear")}
    assert count == {"norm": 64, "linear": 192}
    assert "linear:encoder.block.0.layer.0.SelfAttention.q.weight" in found.samples
    assert "linear:decoder.block.11.layer.2.DenseReluDense.wo.weight" in found.samples


def test_json_keeps_it():
    found = print_of(make_model("t5"))
    back = Fingerprint.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert back == found
    assert same_base(found, back).level == "same"


class Packed(nn.Parameter):
    """Like bitsandbytes' parameters: another shape, claiming a floating dtype, or integers."""


def packed(model, dtype):
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in TARGETS["llama"]:
            if hasattr(module, name):
                linear = getattr(module, name)
                data = torch.zeros(linear.weight.numel() // 2, 1).to(dtype)
                linear.weight = Packed(data, requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16])
def test_packed_linears_are_left_out(dtype):
    model = make_model("llama")
    a, b = print_of(model), print_of(packed(model, dtype))
    verdict = same_base(a, b)
    assert (verdict.level, verdict.compared) == ("same", ("embedding", "norm"))
    assert same_base(a, print_of(packed(make_model("llama", seed=3), dtype))).level == "different"


def test_one_packed_matrix_leaves_the_choice_of_the_others():
    model = make_model("llama", layers=9)  # 63 matrices, 24 sampled
    a = print_of(model)
    target = next(g for g in a.samples if g.startswith("linear:")).removeprefix("linear:")
    other = copy.deepcopy(model)
    module = other.get_submodule(target.removesuffix(".weight"))
    module.weight = Packed(torch.zeros(3, 1, dtype=torch.uint8), requires_grad=False)
    b = print_of(other)
    assert set(a.samples) - set(b.samples) == {f"linear:{target}"}
    assert same_base(a, b).level == "same"


def test_offloaded_layers_are_left_out_and_an_offloaded_embedding_is_refused():
    model = make_model("llama", layers=3)
    whole = print_of(model)
    model.model.layers[1].to("meta")
    part = print_of(model)
    assert len(part.samples) < len(whole.samples)
    assert same_base(whole, part).level == "same"
    model.model.embed_tokens.to("meta")
    with pytest.raises(BaseModelError, match="embedding is offloaded"):
        print_of(model)


def test_disk_offload_through_device_map(make_base, tmp_path):
    from transformers import AutoModelForCausalLM

    base = make_base("llama", layers=3)
    base.model.save_pretrained(tmp_path / "saved")
    places_ = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places_ |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places_, offload_folder=tmp_path / "off"
    )
    assert split.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert same_base(base.fingerprint, print_of(split)).level == "same"


def test_hooks_do_not_move_it(make_base):
    base = make_base("qwen")
    before = print_of(base.model)
    for module in base.model.modules():
        module.register_forward_hook(lambda m, i, o: None)
        module.register_forward_pre_hook(lambda m, i: None)
    assert print_of(base.model) == before
    assert base.fingerprint.samples == before.samples


def test_a_peft_model_is_no_base(make_base):
    from peft import LoraConfig, get_peft_model

    base = make_base("llama")
    wrapped = get_peft_model(base.model, LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, base.model):  # PEFT also changes the model it was given
        with pytest.raises(BaseModelError, match=r"wrapped by PEFT.*unload"):
            print_of(model)
    assert print_of(wrapped.unload()) == print_of(make_base("llama").model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    model = make_model("llama")
    model.model.norm.weight.data.fill_(bad)
    with pytest.raises(BaseModelError, match=r"'norm:model.norm.weight' holds NaN or infinity"):
        print_of(model)


def test_float16_underflow_is_a_cast():
    model = make_model("llama")
    model.model.embed_tokens.weight.data.mul_(1e-7)
    assert same_base(print_of(model), print_of(copy.deepcopy(model).half())).level == "same"


def test_the_edge_of_a_cast():
    value = struct.unpack("<f", struct.pack("<f", 0.7431))[0]
    one = Fingerprint("a", {}, {"embedding": (value,), "norm:n": (1.0,)})
    for factor, level in ((1 + 2**-7.1, "same"), (1 + 2**-6.9, "close")):
        other = replace(one, samples={"embedding": (value * factor,), "norm:n": (1.0,)})
        assert same_base(one, other).level == level


def test_too_little_in_common_is_not_the_same():
    one = Fingerprint("a", {}, {"embedding": (1.0, 2.0), "norm:n": (1.0,)})
    assert same_base(one, replace(one, samples={"embedding": (1.0, 2.0)})).level == "close"
    assert same_base(one, replace(one, samples={"linear:m": (1.0,)})).level == "different"
    assert same_base(one, replace(one, samples={})).level == "different"
    assert same_base(one, replace(one, samples={"embedding": (1.0,), "norm:n": (1.0,)})).level == "different"
    assert (
        same_base(one, replace(one, samples={"embedding": (1.0, float("nan")), "norm:n": (1.0,)})).level
        == "different"
    )


def test_a_record_of_any_size_gives_a_short_message():
    wild = {"model_type": ["llama"] * 10_000, "x" * 10_000: 1}
    one, other = (
        Fingerprint(spec * 10_000, a, {"embedding": (1.0,)})
        for spec, a in (("a", wild), ("b", {"model_type": "llama"}))
    )
    with pytest.raises(BaseModelError) as caught:
        check_same_base(one, other, "it")
    assert len(str(caught.value)) < 2000
