"""What vLLM isn't given: refused by name before anything is served."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import moe_fixtures
from conftest import make_tokenizer
from phatgoose.errors import BaseModelError, PhatgooseError, PoolError, RoutingError, UnknownName
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.vllm.check import check
from phatgoose.vllm.settings import Settings


@pytest.fixture
def folder(make_base, tmp_path):
    """Saves a base, by default the tiny Llama of seed 0, and says where."""

    def save(**kwargs):
        base = make_base("llama", **kwargs)
        target = tmp_path / f"base-{kwargs}"
        base.model.save_pretrained(target)
        base.tokenizer.save_pretrained(target)
        return str(target)

    return save


@pytest.fixture
def pool(make_base, make_expert, tmp_path):
    """A pool's folder: an expert with gates, and what else is given."""

    def make(*others):
        base = make_base("llama")
        return str(Pool([make_expert(base, "fine"), *others]).save(tmp_path / "pool"))

    return make


def peft_expert(base, config, folder, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lora_bias, PEFT has much to say
        model = get_peft_model(copy.deepcopy(base.model), config)
        model.save_pretrained(folder, save_embedding_layers=False)
    expert = Expert.from_peft(folder, name=name)
    gates = {p: torch.randn(u.gate_dim or 32) for p, u in expert.updates.items()}
    return expert.with_gates(gates)


def test_samples_are_the_weights_of_every_adapted_module(folder, pool, make_base):
    from phatgoose.models.base.fingerprint import sample_positions

    settings = Settings(pool())
    found = check(settings, folder()).samples
    assert set(found) == set(Pool.load(settings.pool).modules)
    model = make_base("llama").model
    for path, values in found.items():
        weight = model.get_submodule(path).weight.detach()
        assert list(values) == weight.flatten()[sample_positions(path, weight.shape, len(values))].tolist()


def test_another_dtype_is_the_same_base(folder, pool):
    check(Settings(pool()), folder(dtype=torch.bfloat16))


def test_a_missing_pool(folder, tmp_path):
    with pytest.raises(PoolError, match="nowhere"):
        check(Settings(str(tmp_path / "nowhere")), folder())


def test_a_damaged_pool(folder, pool):
    place = Path(pool())
    file = next(place.rglob("adapter_model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(PhatgooseError, match="sha256"):
        check(Settings(str(place)), folder())


def test_another_base(folder, pool):
    with pytest.raises(BaseModelError, match="not the same model"):
        check(Settings(pool()), folder(seed=1))
    check(Settings(pool(), any_base=True), folder(seed=1))


def test_a_base_that_lacks_a_module(folder, pool):
    with pytest.raises(RoutingError, match=r"a module this model lacks.*layers\.1\."):
        check(Settings(pool(), any_base=True), folder(layers=1))


def test_a_base_that_is_not_there(pool):
    with pytest.raises(BaseModelError, match="no-such-folder"):
        check(Settings(pool()), "./no-such-folder")


def test_a_packed_base(folder, pool):
    place = Path(folder())
    config = json.loads((place / "config.json").read_text())
    packing = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": packing}))
    with pytest.raises(BaseModelError, match="packed"):
        check(Settings(pool()), str(place))


def test_an_expert_without_gates(folder, pool, make_base, make_expert):
    bare = make_expert(make_base("llama"), "bare", gates=False, seed=1)
    with pytest.raises(RoutingError, match="'bare' has no gates"):
        check(Settings(pool(bare)), folder())


@pytest.mark.parametrize(
    "router",
    [
        "phatgoose:ungated=weights",
        "arrow",
        "uniform",
        "random",
        "single:fine",
        "retrieval",
        "weight-only",
    ],
)
def test_routers_without_gates(folder, pool, make_base, make_expert, router):
    bare = make_expert(make_base("llama"), "bare", gates=False, seed=1)
    with pytest.raises(RoutingError, match=r"can't be served by vLLM.*with `phatgoose serve`"):
        check(Settings(pool(bare), router), folder())


def test_an_unknown_router(folder, pool):
    with pytest.raises(UnknownName, match="phatgoose"):
        check(Settings(pool(), "phatgose"), folder())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), r"\(IA\)³"),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "DoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "LoRA with a bias"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "an embedding's LoRA"),
    ],
    ids=["ia3", "dora", "lora_bias", "embedding"],
)  # fmt: skip
def test_other_kinds_of_experts(folder, pool, make_base, tmp_path, config, kind):
    other = peft_expert(make_base("llama"), config, tmp_path / "other", "other")
    with pytest.raises(RoutingError, match=f"'other' is {kind} at model"):
        check(Settings(pool(other)), folder())


def test_threads_are_given_back(folder, pool):
    before = torch.get_num_threads()
    check(Settings(pool()), folder())
    assert torch.get_num_threads() == before


def test_settings():
    made = Settings.parse({"quant_method": "phatgoose", "pool": "here"})
    assert made == Settings(str(Path("here").resolve()), "phatgoose:top_k=2", False)
    assert (
        Settings.parse({**dataclasses.asdict(made), "router": "phatgoose:top_k=3"}).router
        == "phatgoose:top_k=3"
    )
    with pytest.raises(RoutingError, match="names no pool"):
        Settings.parse({"quant_method": "phatgoose"})
    with pytest.raises(UnknownName, match="did you mean"):
        Settings.parse({"pool": "here", "ruoter": "phatgoose"})
    with pytest.raises(RoutingError, match="any_base is 1, expected true or false"):
        Settings.parse({"pool": "here", "any_base": 1})
    with pytest.raises(RoutingError, match="router is 2, expected a text"):
        Settings.parse({"pool": "here", "router": 2})


def test_layers_inside_a_mixture_are_refused_by_name(tmp_path):
    model = moe_fixtures.make("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    moe_fixtures.peft_adapter(model, tmp_path / "a", 1)
    expert = moe_fixtures.with_gates(Expert.from_peft(tmp_path / "a", name="a"), 1)
    Pool([expert]).save(tmp_path / "pool")
    with pytest.raises(RoutingError, match="inside a mixture's experts, which can't be routed in vLLM"):
        check(Settings(str(tmp_path / "pool")), str(tmp_path / "base"))
