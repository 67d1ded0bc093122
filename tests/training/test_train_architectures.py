"""Default modules where a base has more than linear layers of text: what is trained, what is said to be left
out, and that it is read again."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from training_helpers import SMALL, make_task
from transformers import AutoConfig, AutoModelForImageTextToText

from architectures import make
from conftest import make_tokenizer
from phatgoose.errors import TrainingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.base import Base
from phatgoose.routers import Single
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.training.expert import _check_readable, adapted_paths, add_adapter, train_expert
from phatgoose.training.gate import train_gate
from phatgoose.training.modules import describe_left_out, target_paths, text_model_prefix
from phatgoose.training.signature import SignatureConfig, make_signature

SETTINGS = {**SMALL, "rank": 2}


def make_vision_model(kind="gemma3"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {
        **sizes, "vocab_size": 320, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    if kind == "llava":
        text["model_type"], vision["model_type"] = "llama", "clip_vision_model"
    else:
        text["layer_types"] = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config).eval()


def trained(name, **settings):
    base = Base(make(name), make_tokenizer(), spec=f"tiny-{name}")
    config = ExpertConfig(**SETTINGS, **settings)
    return base, config, lambda: train_expert(base, make_task(), config, report=lambda progress: None)


@pytest.mark.slow(3)
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_dense_layers_that_peft_takes_for_experts_are_left_out(name, tmp_path):
    """PEFT takes `down_proj`, by any path, for the fused experts: it would train these,
    and not the layers that were meant."""
    base, config, train = trained(name)
    with pytest.warns(
        UserWarning,
        match=r"mixture's experts.*% of the base's weights.*down_proj, gate_proj, up_proj, which PEFT",
    ):
        expert = train()
    paths = adapted_paths(base, config)
    assert sorted(expert.updates) == paths
    assert not any("mlp" in path for path in paths)
    expert.save(tmp_path / "expert")
    plain = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "expert").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits
        route(base, Pool([expert]), Single(0))
        torch.testing.assert_close(base.model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        unroute(base)


def test_named_they_are_refused_before_the_first_step():
    base, _, train = trained("deepseek_v3", target_modules=("q_a_proj", "down_proj"))
    with pytest.raises(TrainingError, match="doesn't adapt linear layers called down_proj"):
        train()
    paths = [p for p in target_paths(base.model, "all-linear") if not p.endswith(("gate_proj", "up_proj"))]
    with pytest.raises(TrainingError, match=r"other layers than were asked for|can't be read again"):
        add_adapter(Base(make("deepseek_v3"), make_tokenizer(), spec="x"), paths, ExpertConfig(**SETTINGS))


@pytest.mark.slow(5)
@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "nemotron_h"])
def test_what_peft_refuses_in_a_recurrent_base_is_left_out(name):
    base, config, train = trained(name)
    with pytest.warns(UserWarning, match=f"called .*out_proj, which PEFT doesn't adapt in a {name}"):
        expert = train()
    assert sorted(expert.updates) == adapted_paths(base, config)
    assert not any(path.endswith("out_proj") for path in expert.updates)
    with pytest.raises(TrainingError, match="called out_proj"):
        trained(name, target_modules=("out_proj",))[2]()


@pytest.mark.parametrize("name", ["phimoe", "llama4_text"])
def test_routers_that_return_two_things_are_no_linear_layers(name):
    _, _, train = trained(name)
    with pytest.warns(UserWarning, match="mixture's experts"):
        assert not any("router" in path for path in train().updates)


def test_padding_whose_embedding_is_zero_has_no_gradient_of_its_own():
    """Gemma-3n divides by the root of a mean of squares: at zero, where SDPA leaves masked rows,
    its gradient is NaN."""
    base, _, train = trained("gemma3n_text")
    base.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        base.model.get_input_embeddings().weight[0] = 0
    losses = [loss for _, loss in train().provenance["validation_losses"]]
    assert torch.tensor(losses).isfinite().all()


def test_nothing_is_said_where_nothing_is_left_out(make_base):
    for family in ("llama", "gpt2", "t5"):
        model = make_base(family).model
        assert not describe_left_out(model, target_paths(model, "all-linear"))
    for name in ("rwkv", "falcon"):
        paths = target_paths(model := make(name), "all-linear")
        assert paths
        assert not describe_left_out(model, paths)


@pytest.mark.slow(3)
@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_vision_language_base_trains_what_reads_text(kind):
    base = Base(make_vision_model(kind), make_tokenizer(), spec=kind)
    assert text_model_prefix(base.model) == "model.language_model."
    with pytest.warns(
        UserWarning, match=r"linear layers outside of model\.language_model, which see no text"
    ):
        expert = train_expert(base, make_task(), ExpertConfig(**SETTINGS), report=lambda progress: None)
    assert len(expert.updates) == 2 * 7
    assert all(path.startswith("model.language_model.") for path in expert.updates)
    assert make_signature(base, expert, make_task(), SignatureConfig(texts=0)).signature is not None
    gated = train_gate(base, expert, make_task(), GateConfig(**SMALL), report=lambda progress: None)
    assert all(bool(v.any()) for v in gated.gates.values())
    everywhere = {path for path, _ in base.model.named_modules() if path.endswith(".q_proj")}
    assert (
        set(target_paths(base.model, ["q_proj"]))
        == {p for p in everywhere if "language_model" in p}
        != everywhere
    )
    (vision,) = everywhere - set(target_paths(base.model, ["q_proj"]))
    assert target_paths(base.model, [vision]) == [vision]


def test_what_could_not_be_read_again_is_refused(make_base):
    base = make_base("llama")
    model = add_adapter(base, target_paths(base.model, ["q_proj"]), ExpertConfig(**SETTINGS))
    with pytest.raises(TrainingError, match="can't be read again once it is trained"):
        _check_readable(model, LoraConfig(layer_replication=[(0, 1)]), target_paths(base.model, ["q_proj"]))
