import pytest

from architectures import make
from conftest import FAMILIES, TARGETS
from phatgoose.errors import TrainingError
from phatgoose.models.base.layers import linear_shape
from phatgoose.training.modules import target_paths


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_attention_and_feed_forward(make_base, family):
    model = make_base(family).model
    expected = sorted(p for p, _ in model.named_modules() if p.rpartition(".")[2] in TARGETS[family])
    assert target_paths(model, "all-linear") == expected
    assert target_paths(model, TARGETS[family]) == expected
    assert target_paths(model, [expected[0]]) == expected[:1]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(make_base, family):
    model = make_base(family).model
    for path in target_paths(model, "all-linear"):
        shape = tuple(model.get_submodule(path).weight.shape)
        assert linear_shape(model.get_submodule(path)) == (shape if family == "gpt2" else shape[::-1])
    assert linear_shape(model.get_input_embeddings()) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q_pro", "unknown module 'q_pro'.*'q_proj'"),
        ("lm_head", "output head"),
        ("self_attn", "LlamaAttention, not a linear layer"),
        ("embed_tokens", "Embedding, not a linear layer"),
    ],
)
def test_names_that_cannot_be_meant(make_base, name, message):
    with pytest.raises(TrainingError, match=message):
        target_paths(make_base("llama").model, ["q_proj", name])


@pytest.mark.parametrize("name", ["falcon", "phimoe"])
def test_layers_with_a_forward_of_their_own_count_where_they_are_linear(name):
    """Falcon's linear layers have one; PhiMoE's router is an nn.Linear that returns a tuple."""
    model = make(name)
    ends = {path.rpartition(".")[2] for path in target_paths(model, "all-linear")}
    assert (
        ends
        == {
            "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
            "phimoe": {"q_proj", "k_proj", "v_proj", "o_proj"},
        }[name]
    )
