"""Exact match by teacher forcing against generate(), and both against a plain greedy loop,
on answers models do give."""

import random
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from conftest import CORPUS, FAMILIES
from phatgoose.errors import EvaluationError
from phatgoose.evaluation import generate as module
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.generate import _argmax, generate, match_exactly
from phatgoose.evaluation.rows import Row, encode
from phatgoose.models.base.base import decoder_start, end_tokens
from phatgoose.records import Example

WORDS = " ".join(CORPUS).split()


@pytest.fixture
def make_speaker(make_base):
    """A tiny model nudged to say short printable answers that end, by end tokens or newlines."""

    def make(family, dtype=torch.float32):
        base = make_base(family, dtype=dtype)
        head = base.model.get_output_embeddings()
        if family == "t5":  # its random head is its embedding and repeats the last token for ever
            values = torch.randn(320, 32, generator=torch.Generator().manual_seed(0)) * 0.3
            head.weight = torch.nn.Parameter(values.to(dtype))
        nudge = torch.full((320,), -1e3)
        for token in range(2, 320):
            text = base.tokenizer.decode([token])
            if text.isascii() and (text.isprintable() or text == "\n"):
                nudge[token] = 0.0
        nudge[base.tokenizer("\n").input_ids] = 1.5
        nudge[base.tokenizer(" ").input_ids] = 0.5
        nudge[1] = 1.5
        head.register_forward_hook(lambda _, args, out: out + nudge.to(out.dtype))
        base.model.generation_config.eos_token_id = [1, *base.tokenizer("z)").input_ids]
        return base

    return make


def greedy(base, prompt, limit=24):
    """Greedy tokens by repeated full forwards: no cache, no padding, no generate()."""
    tokens, model = [], base.model
    while len(tokens) < limit:
        if model.config.is_encoder_decoder:
            decoder = torch.tensor([[decoder_start(model), *tokens]])
            ids = torch.tensor([prompt])
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoder
            ).logits
        else:
            ids = torch.tensor([[*prompt, *tokens]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in end_tokens(model, 1):
            break
    return tokens


def answer_of(base, tokens, newline_ends=True):
    """The answer in greedy `tokens`, or None if they come to no end."""
    ends = [i for i, token in enumerate(tokens) if token in end_tokens(base.model, 1)]
    text = base.tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True)
    if newline_ends and "\n" in text:
        return text.split("\n")[0].strip()
    return text.strip() if ends else None


def make_rows(base, config, count=49):
    """Rows whose targets are what the model says, or nearly; and whether each is right, by the plain loop."""
    draws, rows, right = random.Random(0), [], []
    for index in range(count):
        prompt = " ".join(draws.choice(WORDS) for _ in range(draws.randint(1, 20)))
        example = Example(prompt, ("x",))
        ids = encode(base, example, index, config).prompt
        said = answer_of(base, greedy(base, ids)) or "nothing"
        other = " ".join(draws.choice(WORDS) for _ in range(2))
        targets = [
            (said,), (other, said), (said + "s",), (said[:-1] or "y",), (other,),
            (said.swapcase() + "!", said), (said, f"{other}\n{said}"),
        ][index % 7]  # fmt: skip
        row = encode(base, Example(prompt, targets), index, config)
        answer = answer_of(
            base, greedy(base, ids, row.rule.limit), newline_ends=not any("\n" in t for t in targets)
        )
        rows.append(row)
        right.append(answer is not None and answer in [t.strip() for t in targets])
    return rows, right


@pytest.mark.slow(8)
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_forcing_equals_generating(make_speaker, monkeypatch, family):
    base, config = make_speaker(family), EvaluationConfig(batch_tokens=200)
    rows, right = make_rows(base, config)
    handed_on, done = [], []

    def spy(model, rows, *rest, **options):
        handed_on.extend(row.index for row in rows)
        return generate(model, rows, *rest, **options)

    monkeypatch.setattr(module, "generate", spy)
    fast = match_exactly(base.model, rows, 0, config, done.append)
    slow = generate(base.model, rows, 0, config, to_the_end=True)
    early = generate(base.model, rows, 0, config)
    assert [p.correct for p in slow] == right
    assert [p.correct for p in fast] == right
    assert [p.correct for p in early] == right
    assert sum(done) == len(rows)
    for quick, full in zip(fast, slow, strict=True):
        assert quick.text == full.text if quick.complete else full.text.startswith(quick.text)
        assert full.complete or not full.correct
    # The data must exercise every verdict, each by both ways.
    ways = Counter((i in handed_on, right[i]) for i in range(len(rows)))
    assert min(ways[way, verdict] for way in (True, False) for verdict in (True, False)) >= 2, ways


@pytest.mark.slow(3)
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_targets_in_the_models_own_tokens_need_no_generation(make_speaker, monkeypatch, family):
    """Greedy outputs laid as they are behind their prompts: right, by one forward; with another end: still judged."""
    from dataclasses import replace

    base, config = make_speaker(family), EvaluationConfig()
    rows, _ = make_rows(base, config, 21)
    said = [greedy(base, row.prompt) for row in rows]
    texts = [answer_of(base, tokens) for tokens in said]
    kept = [
        i
        for i, tokens in enumerate(said)
        if texts[i] and tokens[-1] in end_tokens(base.model, 1) and "\n" not in base.tokenizer.decode(tokens)
    ]
    assert len(kept) >= 3
    monkeypatch.setattr(
        module, "generate", lambda model, rows, *rest: [] if not rows else pytest.fail("generated")
    )
    # Other targets start the same way, one shorter and one longer: the path along the right one must win.
    own = [
        replace(
            rows[i],
            answers=((said[i][0], *[70] * 40, 1), (*said[i][:-1], 1), (said[i][0], 70, 1)),
            rule=replace(rows[i].rule, targets=frozenset(["no", texts[i]]), limit=60),
        )
        for i in kept
        if len(said[i]) > 3
    ]
    assert len(own) >= 2
    assert all(p.correct and p.complete for p in match_exactly(base.model, own, 0, config))


@torch.no_grad()
def test_bfloat16_runs_and_mostly_agrees(make_speaker):
    base, config = make_speaker("llama", torch.bfloat16), EvaluationConfig(batch_tokens=200)
    rows, right = make_rows(base, config)
    fast = [p.correct for p in match_exactly(base.model, rows, 0, config)]
    assert sum(a == b for a, b in zip(fast, right, strict=True)) >= 0.85 * len(rows)


@torch.no_grad()
def test_the_checkpoints_generation_settings_stay_out(make_speaker):
    base, config = make_speaker("llama"), EvaluationConfig()
    rows, right = make_rows(base, config)
    space = base.tokenizer(" ").input_ids
    base.model.generation_config = leaky = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, suppress_tokens=space, min_new_tokens=9, max_length=3,
        num_beams=3, no_repeat_ngram_size=1, forced_bos_token_id=9, begin_suppress_tokens=space, pad_token_id=5,
        eos_token_id=base.model.generation_config.eos_token_id,
    )  # fmt: skip
    before = leaky.to_dict()
    assert [p.correct for p in generate(base.model, rows, 0, config)] == right
    assert base.model.generation_config is leaky
    assert leaky.to_dict() == before


@torch.no_grad()
def test_rows_with_different_limits_stay_within_the_context(make_base):
    """GPT-2 has 512 positions: a short row's long limit must not carry a full row past the last of them."""
    base, config = make_base("gpt2"), EvaluationConfig(batch_tokens=4096)
    rows = [
        encode(base, Example("fox " * 600, ("x",)), 0, config),
        encode(base, Example("fox " * 230, ("yes " * 15,)), 1, config),
    ]
    assert rows[0].truncated
    assert len(rows[0].prompt) + rows[0].rule.limit == 512
    assert rows[1].rule.limit > rows[0].rule.limit
    assert not rows[1].truncated
    assert len(rows[0].prompt) - len(rows[1].prompt) < 64  # so close that they go together
    found = generate(base.model, rows, 0, config, to_the_end=True)
    assert [p.text for p in found] == [
        base.tokenizer.decode(greedy(base, row.prompt, row.rule.limit), skip_special_tokens=True).strip()
        for row in rows
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_nan_names_the_row(make_base, family):
    base, config = make_base(family), EvaluationConfig()
    base.model.get_input_embeddings().weight[77] = float("nan")
    bad = base.tokenizer.decode([77])
    rows = [
        encode(base, Example("the dog", ("yes",)), 3, config),
        encode(base, Example(f"the {bad} dog", ("yes",)), 8, config),
    ]
    for way in (match_exactly, generate):
        with pytest.raises(EvaluationError, match=r"row 8.*not finite"):
            way(base.model, rows, 0, config)


def test_argmax_takes_the_first_of_equals_and_names_the_row_that_is_not_finite():
    logits = torch.zeros(3, 4)
    logits[1, 2] = logits[1, 3] = 5.0
    rows = [Row(7, (5,), ((1,),)), Row(8, (5,), ((1,),)), Row(9, (5,), ((1,),))]
    assert _argmax(logits, rows).tolist() == [0, 2, 0]
    logits[2, 1] = float("nan")
    with pytest.raises(EvaluationError, match="row 9"):
        _argmax(logits, rows)
