"""The sentence encoder against its formula, one text at a time, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from encoder_fixtures import make_encoder, texts
from phatgoose.errors import BaseModelError, DownloadError
from phatgoose.experts.hub import fetch as hub_files
from phatgoose.models.base import sentence_encoder as encoders
from phatgoose.models.base.sentence_encoder import DEFAULT_ENCODER, SentenceEncoder, load_encoder


def formula(folder, text, most):
    """Mean over a text's tokens of the last hidden state, over its length; no batch, no padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(text)["input_ids"][:most]])
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].double().mean(0)
    return mean / mean.norm()


def test_equals_the_formula_in_every_batch(tmp_path):
    folder = make_encoder(tmp_path / "tiny")
    encoder = load_encoder(str(folder))
    rows = [*texts(3, 70), "yes", "fox " * 40]
    found = encoder(rows)
    assert found.shape == (72, 16)
    assert found.dtype == torch.float32
    for vector, text in zip(found, rows, strict=True):
        torch.testing.assert_close(vector.double(), formula(folder, text, 24), rtol=1e-4, atol=1e-5)
    assert encoder.cut(rows) == 1
    assert torch.equal(encoder(rows[3:5]), found[3:5])  # remembered
    assert encoder([]).shape == (0, 16)
    assert encoder.name == "tiny"


def test_what_the_cut_makes_equal_is_computed_once(tmp_path):
    """A long prompt with its answers, token by token, is cut to the same row every time."""
    encoder = SentenceEncoder(make_encoder(tmp_path / "tiny"), "tiny")
    embedded = []
    embed, encoder._embed = encoder._embed, lambda rows: embedded.extend(rows) or embed(rows)
    found = encoder([f"{'fox ' * n}yes" for n in (2, 40, 41, 42)])
    assert [len(row) for row in embedded] == [24, len(embedded[1])]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1:], found[1:2].expand(3, -1))
    assert torch.equal(encoder(["fox " * 99]), found[1:2])
    assert len(embedded) == 2


def test_texts_without_tokens_are_near_to_none(tmp_path):
    folder = make_encoder(tmp_path / "tiny")
    assert torch.equal(SentenceEncoder(folder, "alone")(["", ""]), torch.zeros(2, 16))
    found = SentenceEncoder(folder, "among others")(["", "yes", "the quick brown fox"])
    assert torch.equal(found[0], torch.zeros(16))
    torch.testing.assert_close(found[1].double(), formula(folder, "yes", 24), rtol=1e-4, atol=1e-5)


def test_fingerprints_tell_weights_and_rules_apart(tmp_path):
    one, same, other, short = (
        SentenceEncoder(make_encoder(tmp_path / n, seed, most), n)
        for n, seed, most in (("a", 0, 24), ("b", 0, 24), ("c", 1, 24), ("d", 0, 9))
    )
    assert one.sha256 == same.sha256
    assert len({one.sha256, other.sha256, short.sha256}) == 3


@pytest.mark.slow(3)
def test_what_is_no_mean_pooling_encoder_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="pools by pooling_mode_cls_token; only the mean"):
        load_encoder(str(make_encoder(tmp_path / "cls", pooling="cls_token")))
    broken = make_encoder(tmp_path / "broken")
    (broken / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": "all"}))
    with pytest.raises(BaseModelError, match="max_seq_length is 'all'"):
        load_encoder(str(broken))
    (broken / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"model\.safetensors is missing"):
        load_encoder(str(broken))
    with pytest.raises(BaseModelError, match=f"no such folder, and it is neither '{DEFAULT_ENCODER}'"):
        load_encoder("nowhere")
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE is set"):
        load_encoder("organisation/encoder")


@pytest.mark.network
def test_the_default_encoder_is_the_literatures():
    """The similarities that its model card shows."""
    encoder = load_encoder()
    found = encoder(["That is a happy person", "That is a happy dog", "Today is a sunny day"])
    torch.testing.assert_close((found @ found[0])[1:], torch.tensor([0.695, 0.257]), rtol=0, atol=2e-3)
    assert encoder.max_tokens == 256
    assert load_encoder() is encoder


def test_a_large_file_on_the_hub_is_refused_before_a_byte_of_it_is_fetched(monkeypatch):
    files = {name: hub_files.RemoteFile(10, None) for name in encoders._NEEDED}
    large = hub_files.RemoteFile(5 * 2**30, "0" * 64)
    listing = hub_files.Listing("0" * 40, files | {"model.safetensors": large})
    monkeypatch.setattr(hub_files, "list_files", lambda *_: listing)
    monkeypatch.setattr(hub_files, "hf_hub_download", lambda *_, **__: pytest.fail("it was fetched"))
    with pytest.raises(DownloadError, match=r"model\.safetensors"):
        load_encoder("somebody/large-encoder")


def test_another_encoder_than_is_expected_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    folder = str(make_encoder(tmp_path / "tiny"))
    expected = load_encoder(folder).sha256
    assert load_encoder(folder, expected=expected).sha256 == expected
    monkeypatch.setattr(encoders.AutoModel, "from_pretrained", lambda **_: pytest.fail("it was loaded"))
    with pytest.raises(BaseModelError, match="is another encoder"):
        load_encoder(folder, expected="0" * 64)
