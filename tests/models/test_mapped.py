"""A mapped base is the base, without its values in memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FAMILIES
from phatgoose.errors import BaseModelError
from phatgoose.models.base import without_weights as mapped
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.without_weights import mapped_base


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_is_the_bases(make_base, tmp_path, family, dtype):
    base = make_base(family, dtype=dtype)
    base.model.save_pretrained(tmp_path, max_shard_size="20KB")
    base.tokenizer.save_pretrained(tmp_path)
    found = mapped_base(str(tmp_path))
    assert not found.training
    named = dict(found.named_parameters(remove_duplicate=False))
    for name, parameter in base.model.named_parameters(remove_duplicate=False):
        assert torch.equal(named[name], parameter), name
    one, other = fingerprint(found, "x"), base.fingerprint
    assert (one.samples, one.architecture) == (other.samples, other.architecture)
    ids = torch.tensor([[5, 9, 31, 7]])
    more = {"decoder_input_ids": ids[:, :2]} if family == "t5" else {}
    with torch.no_grad():  # so its buffers are the base's too
        assert torch.equal(found(ids, **more).logits, load(str(tmp_path)).model(ids, **more).logits)


def test_a_checkpoint_under_other_names_is_loaded(make_base, tmp_path, monkeypatch):
    base = make_base("gpt2")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = []
    monkeypatch.setattr(mapped, "load_base", lambda *a, **k: loaded.append(a) or load(*a, **k))
    found = mapped_base(str(tmp_path))
    assert loaded
    assert torch.equal(
        found.transformer.h[0].attn.c_attn.weight, base.model.transformer.h[0].attn.c_attn.weight
    )


load = mapped.load_base


def test_nothing_there(tmp_path):
    with pytest.raises(BaseModelError, match="holds no model"):
        mapped_base(str(tmp_path))
