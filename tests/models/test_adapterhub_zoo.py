"""Adapters that the `adapters` library wrote, routed as pools of one, against what the library itself computes
with them.

tests/data/make_adapterhub.py made them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.routers import PHATGOOSE, Single, Uniform

DATA = Path(__file__).parent.parent / "data" / "adapterhub"
CASES = sorted(
    str(path.parent.relative_to(DATA)) for path in DATA.glob("*/*/adapter_config.json")
)  # "llama/houlsby", …
SEQ2SEQ = ("t5", "mt5")


def base_of(family):
    kind = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
    return kind.from_pretrained(DATA / family).eval()


def expert_of(case):
    return Expert.from_adapterhub(DATA / case, drop=("prediction_head",) if case == "llama/pfeiffer" else ())


def expected_of(family):
    """Inputs, {case: the library's logits}, and which positions count."""
    found = load_file(DATA / family / "expected.safetensors")
    logits = {k.removeprefix("logits."): v for k, v in found.items() if k.startswith("logits.")}
    inputs = {k: v for k, v in found.items() if not k.startswith("logits.")}
    counts = slice(None) if family in SEQ2SEQ else inputs["attention_mask"].bool()
    return inputs, logits, counts


def test_there_are_adapters_of_every_kind_and_architecture():
    assert {case.split("/")[0] for case in CASES} == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "t5",
        "mt5",
    }
    assert len(CASES) == 24


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_pool_of_one_gives_the_librarys_logits(case, backend):
    family, name = case.split("/")
    model, (inputs, logits, counts) = base_of(family), expected_of(family)
    before = model(**inputs).logits
    torch.testing.assert_close(before[counts], logits["base"][counts], atol=1e-5, rtol=1e-5)
    route(model, Pool([expert_of(case)]), Single(0), backend_name=backend, any_base=True)
    torch.testing.assert_close(model(**inputs).logits[counts], logits[name][counts], atol=1e-5, rtol=1e-5)
    unroute(model)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("case", ["llama/pfeiffer", "gpt2/parallel", "qwen2/pfeiffer", "llama/stream"])
@torch.no_grad()
def test_step_by_step_with_a_cache_it_is_the_same(case):
    family, name = case.split("/")
    model, (inputs, logits, _) = base_of(family), expected_of(family)
    route(model, Pool([expert_of(case)]), Single(0), any_base=True)
    ids, cache, found = inputs["input_ids"][:1], None, []
    for step in range(ids.shape[1]):
        out = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), logits[name][:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["t5/pfeiffer", "t5/cross_parallel"])
@torch.no_grad()
def test_decoding_step_by_step_it_is_the_same(case):
    family, name = case.split("/")
    model, (inputs, logits, _) = base_of(family), expected_of(family)
    route(model, Pool([expert_of(case)]), Single(0), any_base=True)
    encoded, cache, found = None, None, []
    for step in range(inputs["decoder_input_ids"].shape[1]):
        out = model(
            input_ids=inputs["input_ids"] if encoded is None else None,
            attention_mask=inputs["attention_mask"],
            encoder_outputs=encoded,
            decoder_input_ids=inputs["decoder_input_ids"][:, step : step + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache, encoded = out.past_key_values, (out.encoder_last_hidden_state,)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), logits[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_it_stays_close():
    inputs, logits, counts = expected_of("llama")
    model = base_of("llama").to(torch.bfloat16)
    route(model, Pool([expert_of("llama/channel")]), Single(0), any_base=True)
    found, wanted = model(**inputs).logits[counts].float(), logits["channel"][counts]
    assert (found - wanted).norm() / wanted.norm() < 0.05


@torch.no_grad()
def test_several_act_as_the_weighted_sum_of_what_each_adds():
    """Only the last layer's feed-forward is adapted, so that the stream after it is linear in what is added."""
    few = expert_of("llama/few")
    inputs, _, _ = expected_of("llama")
    tensors = {
        k: torch.randn(v.shape, generator=torch.Generator().manual_seed(8)) for k, v in few.tensors.items()
    }
    parallel = {**few.adapter_config["config"], "is_parallel": True, "scaling": 0.6, "non_linearity": "tanh"}
    other = Expert("other", {**few.adapter_config, "config": parallel}, tensors)
    model, streams = base_of("llama"), []
    model.model.layers[-1].register_forward_hook(lambda m, a, out: streams.append(out))
    model(**inputs)
    for pool, router in (([few], Single(0)), ([other], Single(0)), ([few, other], Uniform())):
        route(model, Pool(pool), router, any_base=True)
        model(**inputs)
    plain, one, two, both = streams
    assert (one - two).abs().max() > 0.1
    torch.testing.assert_close(both - plain, (one + two) / 2 - plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mixed_pool_with_gates_routes(make_base, make_expert):
    """Bottlenecks, LoRA at the same module, and the null candidate where only some experts act."""
    base = make_base("llama")
    lora = make_expert(base, "lora", targets=["down_proj"])
    config = {
        "config": {"mh_adapter": True, "output_adapter": True, "non_linearity": "gelu", "original_ln_before": True},
        "model_type": "llama", "name": "a", "version": "adapters.1.3.0",
    }  # fmt: skip
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for layer in range(2):
        for place in ("attention", "output"):
            for part, shape in (
                ("adapter_down.0.weight", (3, 32)), ("adapter_down.0.bias", (3,)),
                ("adapter_up.weight", (32, 3)), ("adapter_up.bias", (32,)),
            ):  # fmt: skip
                key = f"model.layers.{layer}.{place}_adapters.adapters.a.{part}"
                tensors[key] = torch.randn(shape, generator=generator) * 0.3
    narrow = Expert("narrow", config, tensors)
    sizes = {"self_attn.o_proj": 32, "mlp.down_proj": 48}
    narrow = narrow.with_gates(
        {
            p: torch.randn(next(d for end, d in sizes.items() if p.endswith(end)), generator=generator)
            for p in narrow.updates
        }
    )
    ids = torch.randint(2, 300, (2, 9), generator=generator)
    found = {}
    for backend in ("torch", "reference"):
        model = route(base, Pool([lora, narrow]), PHATGOOSE(top_k=2), backend_name=backend, any_base=True)
        found[backend] = model(ids).logits
    torch.testing.assert_close(found["torch"], found["reference"], atol=1e-5, rtol=1e-5)
    assert (found["torch"] - unroute(base)(ids).logits).abs().max() > 0.01
