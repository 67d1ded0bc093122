"""What a routed model does after it was copied, cast, moved, offloaded, pickled or given other weights,
and what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoraConfig, PeftModel
from test_adapterhub_zoo import base_of, expert_of
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, M2M100Config, M2M100ForConditionalGeneration

from conftest import TARGETS, VOCABULARY, hooked, make_model, save_adapter, with_random_adapter
from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.base.base import Base
from phatgoose.models.base.layers import linear_shape
from phatgoose.routers import PHATGOOSE, Arrow, Random, Single

IDS = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(0))
KINDS = {
    "(IA)³": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "DoRA": LoraConfig(r=3, target_modules=TARGETS["qwen"], use_dora=True, lora_bias=False),
}


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def adapter(model, config, folder, size=0.2):
    """A PEFT folder with random values."""
    return save_adapter(with_random_adapter(model, config, torch.Generator().manual_seed(5), size), folder)


@pytest.fixture(params=KINDS)
def adapted(request, tmp_path):
    """A base whose adapted layers have biases, an expert of it, and what PEFT computes of any base
    with the same adapter."""
    base = make_model("qwen")
    with torch.no_grad():
        for name, p in base.named_parameters():
            if name.endswith("_proj.bias"):
                p.normal_()
    folder = adapter(base, KINDS[request.param], tmp_path / "adapter")

    def by_peft(model):
        bare = copy.deepcopy(model)
        unroute(bare)
        return logits(PeftModel.from_pretrained(bare, folder).eval())

    return base, Expert.from_peft(folder, name="one"), by_peft


def close(found, expected, within=1e-4):
    assert float((found - expected).norm() / expected.norm()) < within


def other_weights(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "down_proj" in name:
                p.mul_(1.5)


def test_a_copy_goes_by_its_own_weights(adapted):
    base, expert, by_peft = adapted
    route(base, Pool([expert]), Single(0))
    twin = copy.deepcopy(base)
    close(logits(twin), by_peft(base))
    before = logits(base)
    other_weights(twin)
    close(logits(twin), by_peft(twin))
    assert torch.equal(logits(base), before)
    other_weights(base)
    base.load_state_dict({k: v * 0.9 for k, v in base.state_dict().items()})
    close(logits(base), by_peft(base))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_model_comes_back_routed(adapted, how):
    base, expert, _ = adapted
    route(base, Pool([expert]), Single(0))
    expected, file = logits(base), io.BytesIO()
    if how == "pickle":
        back = pickle.loads(pickle.dumps(base))
    else:
        torch.save(base, file)
        back = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(logits(back), expected)
    other_weights(back)
    assert torch.equal(logits(base), expected)
    assert hooked(unroute(back)) == []


@pytest.mark.parametrize("router", [PHATGOOSE(), Random(seed=2), Arrow()], ids=repr)
def test_any_routed_base_is_pickled(make_base, make_expert, router):
    base = make_base("llama")
    route(base, Pool([make_expert(base, f"e{i}", seed=i) for i in range(3)]), router)
    expected = logits(base.model)
    back = pickle.loads(pickle.dumps(base))
    assert isinstance(back, Base)
    assert torch.equal(logits(back.model), expected)
    assert routing_of(back).streams is not routing_of(base).streams


@pytest.mark.parametrize("case", ["llama/pfeiffer", "llama/parallel"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_reads_its_own_residual_stream(case, how):
    model = base_of("llama")
    route(model, Pool([expert_of(case)]), Single(0), any_base=True)
    ids = IDS % 24
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        twin = how(model)
        unroute(model)
        assert torch.equal(twin(input_ids=ids).logits, expected)


def test_a_cast_model_is_as_if_it_was_routed_in_that_dtype(adapted):
    base, expert, _ = adapted
    route(base, Pool([expert]), Single(0))
    for dtype in (torch.bfloat16, torch.float32):
        twin = copy.deepcopy(base).to(dtype)
        found = logits(twin)
        assert torch.equal(found, logits(route(unroute(twin), Pool([expert]), Single(0))))
        base.to(torch.bfloat16)  # the second twin is a float32 one of a bfloat16 model


@pytest.mark.parametrize("case", ["llama/pfeiffer", "llama/parallel"])
def test_a_cast_model_goes_on_reading_its_residual_stream(case):
    model, pool = base_of("llama"), Pool([expert_of(case)])
    route(model, pool, Single(0), any_base=True)
    model.double()
    with torch.no_grad():
        found = model(input_ids=IDS % 24).logits
        assert torch.equal(found, route(model, pool, Single(0), any_base=True)(input_ids=IDS % 24).logits)


def test_a_stack_that_was_rounded_is_made_anew_in_the_wider_dtype(make_base, make_expert):
    base = make_base("llama", dtype=torch.bfloat16)
    pool = Pool([make_expert(base, f"e{i}", seed=i) for i in range(3)])
    route(base, pool)
    base.model.float()
    found = logits(base.model)
    assert torch.equal(found, logits(route(base, pool)))


@pytest.mark.parametrize("first", ["route", "offload"])
def test_offloaded_before_or_after_it_is_the_same(adapted, first):
    base, expert, _ = adapted
    route(base, Pool([expert]), Single(0))
    expected = logits(base)
    if first == "offload":
        unroute(base)
    cpu_offload(base)
    if first == "offload":
        route(base, Pool([expert]), Single(0))
    close(logits(base), expected, 1e-5)


class Two(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y


class Wide(nn.Linear):
    def forward(self, x):
        return super().forward(x).repeat(1, 1, 2)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_module_that_returns_a_tuple_is_refused_before_anything_is_attached(make_base, make_expert):
    base = make_base("llama")
    pool, layer = Pool([make_expert(base)]), base.model.model.layers[1].mlp
    layer.gate_proj = Two(32, 48)
    with pytest.raises(RoutingError, match=r"layers\.1\.mlp\.gate_proj, a Two"):
        route(base, pool, any_base=True)
    assert hooked(base.model) == []
    assert routing_of(base) is None


def test_only_what_maps_a_tensor_to_one_of_its_size_is_a_linear_layer():
    assert linear_shape(nn.Linear(3, 5)) == linear_shape(Scaled(3, 5)) == (3, 5)
    assert linear_shape(Two(3, 5)) is linear_shape(Wide(3, 5)) is None
    with torch.device("meta"):
        assert linear_shape(Scaled(3, 5)) == (3, 5)


def test_a_module_that_turns_out_to_return_no_tensor_takes_the_routing_off(make_base, make_expert):
    base = make_base("llama")
    route(base, Pool([make_expert(base)]))
    before = base.model.model.layers[0].mlp.up_proj.forward
    base.model.model.layers[0].mlp.up_proj.forward = lambda x: (before(x), None)
    with pytest.raises(RoutingError, match=r"layers\.0\.mlp\.up_proj is a Linear that returns a tuple"):
        logits(base.model)
    assert hooked(base.model) == []
    assert routing_of(base) is None


def test_attaching_that_fails_leaves_the_earlier_routing(make_base, make_expert, monkeypatch):
    base = make_base("llama")
    one, two = make_expert(base, "one", seed=1), make_expert(base, "two", seed=2)
    route(base, Pool([one]))
    expected = logits(base.model)
    down = base.model.model.layers[1].mlp.down_proj
    register, failing = down.register_forward_hook, [True]

    def fails_once(*args, **kwargs):
        if failing:
            failing.clear()
            raise MemoryError
        return register(*args, **kwargs)

    monkeypatch.setattr(down, "register_forward_hook", fails_once)
    with pytest.raises(MemoryError):
        route(base, Pool([two]))
    assert torch.equal(logits(base.model), expected)
    assert hooked(unroute(base)) == []


def test_a_trace_of_torchscript_is_refused(make_base, make_expert):
    base = make_base("llama")
    for backend in ("auto", "torch"):
        route(base, Pool([make_expert(base)]), backend_name=backend)
        with pytest.raises(RoutingError, match=r"torch\.jit\.trace would keep the choice"):
            torch.jit.trace(base.model.model.layers[0].mlp, torch.randn(1, 3, 32))
    assert routing_of(base) is not None


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("family", ["gemma", "m2m100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding_that_scales_its_rows_is_pefts(tmp_path, family, dtype):
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "tie_word_embeddings": False,
    }
    if family == "gemma":
        config = GemmaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, **common,
        )  # fmt: skip
        model, target, kwargs = GemmaForCausalLM(config), "embed_tokens", {}
    else:
        config = M2M100Config(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, scale_embedding=True, **common,
        )  # fmt: skip
        model, target = M2M100ForConditionalGeneration(config), "encoder.embed_tokens"
        kwargs = {"decoder_input_ids": IDS[:, :4]}
    model = model.eval().to(dtype)
    folder = adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=[target]), tmp_path / "a", size=1.0)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), **kwargs)
    plain = logits(model, **kwargs)
    route(model, Pool([Expert.from_peft(folder, name="one")]), Single(0))
    close(logits(model, **kwargs), expected, 1e-5 if dtype == torch.float32 else 1e-2)
    assert float((expected - plain).norm() / plain.norm()) > 0.02
    assert torch.equal(logits(unroute(model), **kwargs), plain)


class Packed(nn.Module):
    """A linear layer in 8 bits. Like bitsandbytes' it unpacks in place: its own tensors are moved away,
    and it can't run afterwards."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.W_q, self.state = self.weight, {"scale": scale}

    def dequantize(self):
        whole = self.weight.float() * self.state.pop("scale")
        self.weight = None
        return whole

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.state["scale"], self.bias)


@pytest.mark.parametrize("adapted", ["DoRA"], indirect=True)
def test_dora_reads_a_packed_base_and_leaves_it_as_it_is(adapted):
    base, expert, _ = adapted
    packed = copy.deepcopy(base)
    for layer, twin in zip(base.model.layers, packed.model.layers, strict=True):
        twin.mlp.up_proj = Packed(layer.mlp.up_proj)
        with torch.no_grad():
            layer.mlp.up_proj.weight.copy_(Packed(layer.mlp.up_proj).dequantize())
    plain = logits(packed)
    route(packed, Pool([expert]), Single(0))
    route(base, Pool([expert]), Single(0))
    for _ in range(2):
        close(logits(packed), logits(base), 1e-5)
    assert torch.equal(logits(unroute(packed)), plain)
