"""Draws against the formulas, written plainly."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phatgoose.serving.engine.sampling import (
    HEAD,
    SamplingParams,
    SequenceSampler,
    sample_batch,
    token_logprobs,
)


def logits_of(size=50, seed=0, scale=2.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(settings, logits, times, branch=0):
    draw = SequenceSampler(settings, branch)
    found = []
    for _ in range(times):
        found.append(draw.next_token(logits))
    return found


def shares(tokens, size):
    return torch.bincount(torch.tensor(tokens), minlength=size).double() / len(tokens)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3), (1.0, 1e-9)]
)
def test_draws_have_the_probabilities_that_were_asked_for(temperature, top_p):
    logits = logits_of()
    wanted = torch.softmax(logits.double() / temperature, -1)
    order = wanted.argsort(descending=True)
    kept, mass = [], 0.0
    for token in order.tolist():
        if mass >= top_p and kept:
            break
        kept.append(token)
        mass += float(wanted[token])
    only = torch.zeros_like(wanted)
    only[kept] = wanted[kept] / wanted[kept].sum()
    n = 4000
    found = shares(drawn(SamplingParams(temperature, top_p, seed=7), logits, n), 50)
    assert set(found.nonzero().squeeze(1).tolist()) <= set(kept)
    assert (found - only).abs().max() < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_smallest_temperatures_are_greedy(temperature, top_p):
    for logits in (logits_of(), logits_of() - 80, logits_of().masked_fill(logits_of() < 0, -math.inf)):
        assert set(drawn(SamplingParams(temperature, top_p), logits, 20)) == {int(logits.argmax())}
    two = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert set(drawn(SamplingParams(temperature), two, 60)) == {1, 2}


def test_a_flat_distribution_needs_more_than_the_head():
    logits = torch.zeros(3 * HEAD)
    found = drawn(SamplingParams(1.0, 0.9, seed=1), logits, 6000)
    assert HEAD * 2 < len(set(found)) <= math.ceil(0.9 * 3 * HEAD)


def test_seeds():
    logits = logits_of()
    one = drawn(SamplingParams(seed=3), logits, 20)
    assert one == drawn(SamplingParams(seed=3), logits, 20)
    assert one != drawn(SamplingParams(seed=4), logits, 20)
    assert one != drawn(SamplingParams(seed=3), logits, 20, branch=1)
    assert drawn(SamplingParams(), logits, 20) != drawn(SamplingParams(), logits, 20)
    assert drawn(SamplingParams(seed=-(2**63)), logits, 3) == drawn(SamplingParams(seed=-(2**63)), logits, 3)


def test_penalties_and_bias_are_openais():
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0])
    draw = SequenceSampler(SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=1.0))
    # 3 at 4; then at 2.5, so 2 at 3; then 3 at 2.5; then 3 at 1.5, 2 at 1.5, so 1 at 2; then 3 and 2 are
    # equal: the first.
    assert [draw.next_token(logits) for _ in range(5)] == [3, 2, 3, 1, 2]
    assert SequenceSampler(SamplingParams(temperature=0, logit_bias={0: 100})).next_token(logits) == 0
    assert SequenceSampler(SamplingParams(temperature=0, logit_bias={3: -100})).next_token(logits) == 2
    assert logits.tolist() == [1, 2, 3, 4]


def test_log_probabilities_are_the_models_own():
    logits = logits_of(30)
    wanted = torch.log_softmax(logits.double(), -1)
    draw = SequenceSampler(SamplingParams(temperature=2, top_p=0.5, seed=1, logit_bias={4: 50}, logprobs=3))
    assert draw.next_token(logits) == 4
    (one,) = draw.logprobs
    assert one.token == 4
    assert one.logprob == pytest.approx(float(wanted[4]), abs=1e-5)
    assert [t for t, _ in one.top] == wanted.topk(3).indices.tolist()
    assert [lp for _, lp in one.top] == pytest.approx(wanted.topk(3).values.tolist(), abs=1e-5)
    rows = torch.stack([logits, -logits]).bfloat16()
    first, second = token_logprobs(rows, [1, 2], 0)
    assert first.top == ()
    assert second.logprob == pytest.approx(float(torch.log_softmax(rows[1].double(), -1)[2]), abs=1e-5)


def test_many_at_once_don_t_disturb_each_other():
    rows = torch.stack([logits_of(seed=i) for i in range(4)])
    rows[1, 7] = math.nan
    rows[2, :] = -math.inf
    settings = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(seed=5),
    ]
    tokens, failed = sample_batch(rows, [SequenceSampler(s) for s in settings])
    assert tokens[0] == int(rows[0].argmax())
    assert tokens[3] == SequenceSampler(settings[3]).next_token(rows[3])
    assert sorted(failed) == [1, 2]
    assert all("not finite" in str(e) for e in failed.values())
    assert sample_batch(rows[:0], []) == ([], {})


def processed(logits, *processors, before=()):
    """transformers' own processors, one after the other."""
    ids, found = torch.tensor([list(before)], dtype=torch.long), logits[None].clone()
    for processor in processors:
        found = processor(ids, found)
    return found[0]


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        ({"top_k": 7, "top_p": 0.8}, [TopKLogitsWarper(7), TopPLogitsWarper(0.8)]),
        ({"top_k": 9, "top_p": 0.9, "min_p": 0.1, "temperature": 1.7},
         [TemperatureLogitsWarper(1.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)]),
        ({"repetition_penalty": 1.8, "temperature": 0.7},
         [RepetitionPenaltyLogitsProcessor(1.8), TemperatureLogitsWarper(0.7)]),
        ({"repetition_penalty": 0.5}, [RepetitionPenaltyLogitsProcessor(0.5)]),
    ],
)  # fmt: skip
def test_draws_are_transformers(settings, processors):
    logits, before, n = logits_of(seed=4), [1, 7, 7, 30], 4000
    logits[13] = logits.sort(descending=True).values[4]  # the fifth highest twice
    wanted = torch.softmax(processed(logits.double(), *processors, before=before), -1)
    each = [SequenceSampler(SamplingParams(seed=i, **settings), prompt=before) for i in range(n)]
    found = shares([draw.next_token(logits) for draw in each], 50)
    assert set(found.nonzero().squeeze(1).tolist()) <= set(wanted.nonzero().squeeze(1).tolist())
    assert (found - wanted).abs().max() < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("penalty", [1.3, 0.7, 30.0])
def test_repetitions_are_penalised_as_in_transformers(penalty):
    """What was in the prompt and what was written, once, however often it was there."""
    processor, before = RepetitionPenaltyLogitsProcessor(penalty), [3, 3, 9]
    draw = SequenceSampler(SamplingParams(temperature=0, repetition_penalty=penalty), prompt=before)
    for step in range(30):
        logits = logits_of(20, seed=step)
        wanted = int(processed(logits, processor, before=before).argmax())
        assert draw.next_token(logits) == wanted
        before = [*before, wanted]


def test_what_is_ruled_out_is_not_written():
    ends, words, allowed = frozenset([4, 6]), ((2,), (8, 9), (8, 9, 1), (5, 5)), tuple(range(1, 12))
    bad = NoBadWordsLogitsProcessor([list(word) for word in words])
    settings = SamplingParams(temperature=0, min_tokens=12, end_tokens=ends, bad_words=words, allowed=allowed)
    draw, written = SequenceSampler(settings, prompt=[8]), []
    for step in range(60):
        logits = logits_of(15, seed=step)
        least = MinNewTokensLengthLogitsProcessor(0, 12, sorted(ends), device="cpu")
        wanted = processed(logits, bad, least, before=written)
        wanted[[0, 12, 13, 14]] = -math.inf
        written.append(draw.next_token(logits))
        assert written[-1] == int(wanted.argmax())
    assert not ends & set(written[:12])
    assert ends & set(written)
    with pytest.raises(ArithmeticError, match="rule out every token"):
        SequenceSampler(SamplingParams(temperature=0, bad_words=((5,),), allowed=(5,))).next_token(
            logits_of()
        )


def test_ranks_count_what_is_likelier():
    logits = logits_of(30)
    order = logits.argsort(descending=True).tolist()
    found = token_logprobs(logits.repeat(30, 1), order, 3)
    assert [one.rank for one in found] == list(range(1, 31))
