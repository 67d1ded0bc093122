"""A tiny random sentence encoder in a folder, as sentence-transformers writes one, and data signatures
of random texts."""

from __future__ import annotations

import json

import torch
from transformers import BertConfig, BertModel

from conftest import CORPUS, VOCABULARY, make_tokenizer
from phatgoose.experts.data_signature import DataSignature
from phatgoose.models.base.sentence_encoder import load_encoder

WORDS = " ".join(CORPUS).split()


def make_encoder(folder, seed=0, max_tokens=24, pooling="mean_tokens"):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.8,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=True).eval().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


def texts(seed, count=7):
    g = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (3 + n % 5,), generator=g)) for n in range(count)
    ]


def signed(expert, folder, seed=0, count=7):
    """The expert with random mean activations and random texts, embedded by the encoder in `folder`."""
    encoder = load_encoder(str(folder))
    g = torch.Generator().manual_seed(seed)
    means = {p: torch.randn(u.gate_dim, generator=g) for p, u in expert.updates.items()}
    made = DataSignature(means, encoder(texts(seed, count)), encoder.name, encoder.sha256)
    return expert.with_signature(made, {"rows": 3, "texts": count, "encoder": encoder.name})
