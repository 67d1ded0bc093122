import pytest
import torch

from conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_generate(make_base, family):
    base = make_base(family)
    batch = base.tokenizer(["the quick brown"], return_tensors="pt")
    out = base.model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 1
    assert torch.isfinite(base.model.get_input_embeddings().weight).all()
