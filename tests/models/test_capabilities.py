"""A row's logits don't depend on the rows beside it, whatever the architecture:
against plain forwards, one row each, no padding."""

import pytest
import torch

from architectures import ENCODER_DECODERS, make
from conftest import make_tokenizer
from phatgoose.errors import BaseModelError
from phatgoose.models.base.base import Base, decoder_start
from phatgoose.models.text.batch import IGNORED, decoder_inputs, make_batch, target_logits
from phatgoose.models.text.capabilities import (
    check_scorable,
    generation_groups,
    max_mixed_length,
    supports_left_padding,
)
from phatgoose.models.text.encoding import Encoded

ABSOLUTE = ["bart", "marian", "m2m_100", "blenderbot", "led", "fsmt"]
LEFT = ["gpt2", "opt", "bloom", "mpt", "gemma3n_text", "deepseek_v2", "minicpm3"]
RIGHT = ["rwkv", "recurrent_gemma", "mamba", "zamba2", "minimax", "lfm2", "qwen3_5_text"]
TOGETHER = ["prophetnet", "switch_transformers", "nllb-moe"]


def rows_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: tuple(torch.randint(3, 320, (n,), generator=generator).tolist())  # noqa: E731
    return [Encoded(ids(p), ids(t)) for p, t in ((3, 4), (26, 5), (26, 1), (1, 9), (11, 2))]


def plain(model, row):
    """Logits [targets, vocabulary] from one forward over one row."""
    if model.config.is_encoder_decoder:
        decoder = [[decoder_start(model), *row.target_ids[:-1]]]
        inputs = {"input_ids": torch.tensor([row.prompt_ids]), "decoder_input_ids": torch.tensor(decoder)}
        return model(**inputs, use_cache=False).logits[0]
    whole = torch.tensor([row.prompt_ids + row.target_ids])
    return model(input_ids=whole).logits[0, len(row.prompt_ids) - 1 : -1]


def assert_plain(model, rows):
    batch = make_batch(Base(model, make_tokenizer(), spec="tiny"), rows)
    with torch.no_grad():
        logits = target_logits(model, batch)
        for found, labels, row in zip(logits, batch["labels"], rows, strict=True):
            assert labels[labels != IGNORED].tolist() == list(row.target_ids)
            torch.testing.assert_close(found[labels != IGNORED], plain(model, row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ABSOLUTE + LEFT + RIGHT + TOGETHER)
def test_a_padded_rows_logits_are_its_own(name):
    model = make(name)
    check_scorable(model)
    assert supports_left_padding(model) == (name in LEFT)
    assert_plain(model, rows_of())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_hang_on_the_longest_row(kind):
    """Where a long row turns all positions otherwise, a short one beside it isn't touched."""
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        scaling |= {
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16,
        }
    settings = {"max_position_embeddings": 64 if kind == "longrope" else 16, "rope_parameters": scaling}
    model = make("llama", **settings)
    assert max_mixed_length(model) == 16
    assert_plain(model, rows_of()[:2] if kind == "longrope" else rows_of()[:1] * 2)
    assert generation_groups(model, [(1, 2), (3,) * 20, (4, 5)], 4) == [[0, 2], [1]]
    assert generation_groups(model, [(1, 2), (3,) * 9], 4) == [[0, 1]]


def test_only_rows_of_one_length_go_on_together_where_padding_is_read():
    assert generation_groups(make("recurrent_gemma"), [(1, 2), (3,), (4, 5)], 9) == [[0, 2], [1]]
    assert generation_groups(make("rwkv"), [(1, 2), (3,), (4, 5)], 9) == [[0], [1], [2]]
    assert generation_groups(make("llama"), [(1, 2), (3,), (4, 5)], 9) == [[0, 1, 2]]
    assert generation_groups(make("bart"), [(1, 2), (3,), (4, 5)], 9) == [[0, 1, 2]]


@pytest.mark.parametrize("name", ["xlnet", "bert"])
def test_attention_that_looks_ahead_is_refused(name):
    model = make(name, **({"is_decoder": False} if name == "bert" else {}))
    with pytest.raises(BaseModelError, match=r"isn't causal.*mean nothing"):
        check_scorable(model)
    assert not model.training


def test_experts_that_a_batch_competes_for_are_refused():
    with pytest.raises(BaseModelError, match=r"moe_eval_capacity_token_fraction=0\.5"):
        check_scorable(make("nllb-moe", moe_eval_capacity_token_fraction=0.5))


@pytest.mark.parametrize("name", [n for n in ENCODER_DECODERS if n != "t5gemma"])
def test_a_decoder_starts_in_training_as_in_generation(name):
    """mBART and PLBart would shift the last label to the front; M2M100 and Blenderbot have no such function."""
    model = make(name)
    labels = torch.tensor([[7, 8, 1], [9, 1, IGNORED]])
    start = decoder_start(model)
    written = model.generate(
        torch.tensor([[5, 6, 1]]), max_new_tokens=1, do_sample=False, num_beams=1, use_cache=False
    )
    assert written[0, 0] == start
    assert decoder_inputs(model, labels).tolist() == [[start, 7, 8], [start, 9, 1]]
