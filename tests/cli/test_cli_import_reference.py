"""`phatgoose import-reference`, with the base's weights at hand and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from phatgoose import Pool

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def t5(save_base):
    return Path(save_base("t5"))


@pytest.fixture
def checkpoint(t5, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(t5)
    found = {"encoder.embed_tokens.weight": model.encoder.embed_tokens.weight.detach().clone()}
    for i in range(2):
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path.endswith(".q"):
                found[f"{path}._addons.expert_lora.layer1__{i}"] = torch.randn(module.in_features, 16)
                found[f"{path}._addons.expert_lora.layer2__{i}"] = torch.randn(16, module.out_features)
                found[f"{path}._addons.router.expert_embeddings__{i}"] = torch.randn(module.in_features)
    torch.save(found, tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.mark.slow(3)
def test_with_the_bases_weights(run, t5, checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("agnews\ncosmosqa\n")
    out = tmp_path / "pool"
    done = run("import-reference", checkpoint, "--base", t5, "--out", out, "--names", tmp_path / "names.txt")
    assert done.code == 0, done.err
    assert "2 experts at 6 modules" in done.out
    assert "left out" not in done.err
    pool = Pool.load(out)
    assert pool.names == ("agnews", "cosmosqa")
    assert pool.base is not None
    answered = run("generate", "red", "--pool", out, "--base", t5)
    assert answered.code == 0, answered.err


@pytest.mark.slow(3)
def test_no_tokenizer_is_needed(run, t5, checkpoint, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(t5, bare, ignore=shutil.ignore_patterns("token*", "special*"))
    done = run("import-reference", checkpoint, "--base", bare, "--out", tmp_path / "pool")
    assert done.code == 0, done.err
    assert Pool.load(tmp_path / "pool").base.samples


def test_with_the_configuration_alone(run, t5, checkpoint, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(t5, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    done = run("import-reference", checkpoint, "--base", bare, "--out", tmp_path / "pool")
    assert done.code == 0, done.err
    assert "weights aren't on this machine" in done.err
    assert "encoder.embed_tokens.weight in the checkpoint was left out" in done.err
    assert Pool.load(tmp_path / "pool").base is None


@pytest.mark.slow(8)
def test_refusals(run, base, t5, checkpoint, tmp_path):
    out = tmp_path / "pool"
    other = run("import-reference", checkpoint, "--base", base, "--out", out)
    assert (other.code, "unknown key 'encoder.embed_tokens.weight'" in other.err) == (1, True), other.err
    nowhere = run("import-reference", checkpoint, "--base", tmp_path / "nowhere", "--out", out)
    assert nowhere.code == 1
    (tmp_path / "names.txt").write_text("agnews\n")
    for names, message in (("names.txt", "there are 1 names and 2 experts"), ("none.txt", "can't be read")):
        done = run("import-reference", checkpoint, "--base", t5, "--out", out, "--names", tmp_path / names)
        assert (done.code, message in done.err) == (1, True), done.err
    config = json.loads((t5 / "config.json").read_text())
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "config.json").write_text(json.dumps(config | {"d_model": 64}))
    done = run("import-reference", checkpoint, "--base", wide, "--out", out)
    assert (done.code, "has shape" in done.err) == (1, True), done.err
    assert not out.exists()
