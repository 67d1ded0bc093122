"""The checkpoint's own generation settings change nothing that is written here;
oracle: argmax after argmax, in a loop."""

import pytest
import torch
from transformers import GenerationConfig

from phatgoose.cli.common.options import GenerationOptions
from phatgoose.cli.common.streaming import stream
from phatgoose.models.base.base import decoder_start, end_tokens
from phatgoose.models.base.load import forced_start
from phatgoose.models.text.encoding import encode_prompt
from phatgoose.models.text.generate import generation_settings, greedy_answer, run_generate

NEW = 12
LEAKS = {
    "repetition_penalty": {"repetition_penalty": 9.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "min_length": {"min_length": 400},
    "min_new_tokens": {"min_new_tokens": NEW},
    "max_length": {"max_length": 3},
    "max_time": {"max_time": 1e-9},
    "num_beams": {"num_beams": 3, "length_penalty": -3.0},
    "sequence_bias": {"sequence_bias": [[[7], 1e4]]},
    "guidance_scale": {"guidance_scale": 9.0},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 9.0)},
    "watermarking_config": {"watermarking_config": {"bias": 1e4, "seeding_scheme": "lefthash"}},
    "stop_strings": {"stop_strings": [" ", "e", "\n"]},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.9},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 2},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "token_healing": {"token_healing": True},
}


@torch.no_grad()
def plain(base, ids):
    """Tokens after ids [1, T], each the argmax of a forward over all before it."""
    written, ends = [], end_tokens(base.model, base.tokenizer.eos_token_id)
    while len(written) < NEW and not ends.intersection(written):
        rest = torch.tensor([written], dtype=torch.long)
        if base.is_encoder_decoder:
            start = torch.tensor([[decoder_start(base.model)]])
            logits = base.model(input_ids=ids, decoder_input_ids=torch.cat([start, rest], 1)).logits
        else:
            logits = base.model(input_ids=torch.cat([ids, rest], 1)).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def leak(base, **settings):
    first = plain(base, encode_prompt(base, "the quick brown fox jumps over"))[:1]
    listed = {"suppress_tokens": first, "begin_suppress_tokens": first, "bad_words_ids": [first]}
    own = base.model.generation_config
    kept = {name: getattr(own, name) for name in ("eos_token_id", "decoder_start_token_id")}
    base.model.generation_config = made = GenerationConfig(**kept)
    for name, value in settings.items():
        setattr(made, name, listed.get(name, value))


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("name", [*LEAKS, "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"])
def test_greedy_is_greedy_whatever_the_checkpoint_says(make_base, capsys, family, name):
    base = make_base(family)
    ids = encode_prompt(base, "the quick brown fox jumps over")
    right = plain(base, ids)
    leak(base, **LEAKS.get(name, {name: None}))
    text = stream(base, ids, GenerationOptions(max_new_tokens=NEW, temperature=0.0))
    assert text == base.tokenizer.decode(right, skip_special_tokens=True).lstrip()
    start = 1 if base.is_encoder_decoder else ids.shape[1]
    assert greedy_answer(base, ids, NEW)[0, start:].tolist() == right


def test_draws_are_of_the_models_own_distribution(make_base):
    base = make_base("llama")
    ids = encode_prompt(base, "the quick brown fox").expand(4000, -1)
    leak(base, repetition_penalty=9.0, min_p=0.9, typical_p=0.1)
    settings = generation_settings(base.model, pad=0, max_new_tokens=1, temperature=0.7)
    torch.manual_seed(0)
    out = run_generate(base.model, ids.tolist(), settings)
    with torch.no_grad():
        expected = (base.model(ids[:1]).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(out[:, -1], minlength=len(expected)) / len(ids)
    assert float((found - expected).abs().max()) < 0.04


def test_a_forced_first_token_is_told(make_base):
    base = make_base("t5")
    assert forced_start(base.model, base.tokenizer) is None
    base.model.generation_config.forced_bos_token_id = base.tokenizer.convert_tokens_to_ids("a")
    assert "begin with 'a'; here nothing is forced" in forced_start(base.model, base.tokenizer)
