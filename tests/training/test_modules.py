import pytest

from conftest import FAMILIES, TARGETS
from phatgoose.errors import TrainingError
from phatgoose.training.modules import sizes, target_paths


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
        assert sizes(model.get_submodule(path)) == (shape if family == "gpt2" else shape[::-1])
    assert sizes(model.get_input_embeddings()) is None


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
