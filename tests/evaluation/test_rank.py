"""Ranking with shared caches, padding and batches against one plain forward a choice."""

import random

import pytest
import torch

from conftest import CORPUS, FAMILIES
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.batching import split_into_batches
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.rank import best, score_choices
from phatgoose.evaluation.rows import Row, encode
from phatgoose.records import Example
from ranking_fixtures import assert_plain, score_choice_plainly

WORDS = " ".join(CORPUS).split()


def phrase(draws, words):
    return " ".join(draws.choice(WORDS) for _ in range(words))


def make_rows(base, count=14, seed=0):
    """Prompts of 1 to 25 words with 1 to 6 choices of 1 to 4 words."""
    draws, config = random.Random(seed), EvaluationConfig()
    found = []
    for index in range(count):
        choices = tuple(phrase(draws, draws.randint(1, 4)) for _ in range(draws.randint(1, 6)))
        example = Example(phrase(draws, draws.randint(1, 25)), choices[:1], choices)
        found.append(encode(base, example, index, config))
    # Answers that are the end token alone, one token and the end, a duplicate.
    return [*found, Row(count, found[0].prompt, ((1,), (70, 1), (70, 71, 72, 1), (70, 1)))]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        EvaluationConfig(),
        EvaluationConfig(batch_tokens=150),
        EvaluationConfig(batch_tokens=90, cache_tokens=60, logit_values=4000, batch_rows=3),
        EvaluationConfig(batch_tokens=1),
    ],
    ids=["one batch", "some batches", "tight", "row by row"],
)
def test_scores_equal_the_definition(make_base, family, config):
    base = make_base(family)
    rows = make_rows(base)
    done = []
    scores = score_choices(base.model, rows, 0, config, done.append)
    assert sum(done) == len(rows)
    assert_plain(base.model, rows, scores)
    assert scores[-1][1] == scores[-1][3]  # equal tokens tie exactly
    assert len({round(s, 3) for s in scores[-1]}) == 3


@torch.no_grad()
def test_plain_score_is_the_models_own_loss(make_base):
    """transformers' loss is the mean negative log-likelihood of the labels that are not -100."""
    for family in FAMILIES:
        base = make_base(family)
        row = make_rows(base, 1)[0]
        prompt, answer = list(row.prompt), list(row.answers[0])
        if family == "t5":
            loss = base.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
        else:
            labels = torch.tensor([[-100] * len(prompt) + answer])
            loss = base.model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        assert score_choice_plainly(base.model, prompt, answer) == pytest.approx(-float(loss), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(make_base, family):
    base = make_base(family, dtype=torch.bfloat16)
    rows = make_rows(base, 6)
    for row, found in zip(
        rows, score_choices(base.model, rows, 0, EvaluationConfig(batch_tokens=99)), strict=True
    ):
        expected = [score_choice_plainly(base.model, row.prompt, answer) for answer in row.answers]
        assert found == pytest.approx(expected, rel=0.03)


@torch.no_grad()
def test_answers_up_to_the_last_position_of_the_context(make_base):
    """GPT-2 has a table of 512 positions: padding beside a longer answer must not reach behind it."""
    base = make_base("gpt2")
    prompt = tuple(random.Random(0).choices(range(2, 320), k=505))
    row = Row(0, prompt, ((5, 6, 7, 8, 9, 10, 1), (5, 1)))
    short = Row(1, prompt[:500], ((5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1),))
    full = EvaluationConfig(batch_tokens=4096)
    found = score_choices(base.model, [row, short, Row(2, prompt[:3] * 170, ((4, 5, 1),))], 0, full)
    expected = [score_choice_plainly(base.model, prompt, answer) for answer in row.answers]
    assert found[0] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_read_once(make_base, family):
    base = make_base(family)
    seen = []
    name = "encoder" if family == "t5" else "get_input_embeddings"
    module = base.model.get_encoder() if family == "t5" else base.model.get_input_embeddings()
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).numel()),
        with_kwargs=True,
    )
    prompt = tuple(range(10, 50))
    score_choices(
        base.model, [Row(0, prompt, tuple((n, n + 1, 1) for n in range(20, 29)))], 0, EvaluationConfig()
    )
    handle.remove()
    assert seen == ([40] if family == "t5" else [40, 18]), name


@torch.no_grad()
def test_nan_names_the_row(make_base):
    base = make_base("llama")
    base.model.get_input_embeddings().weight[77] = float("nan")
    rows = [Row(4, (5, 6, 7), ((8, 1),)), Row(9, (5, 77, 7, 8), ((8, 1),))]
    with pytest.raises(EvaluationError, match=r"row 9.*not finite"):
        score_choices(base.model, rows, 0, EvaluationConfig())


def test_ties_go_to_the_first():
    assert best([-2.0, -1.0, -1.0]) == 1
    assert best([0.0]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_everything_once_within_limits(seed):
    draws = random.Random(seed)
    lengths = [
        draws.choice([0, 1, 2, 3, 3, 3, 40, draws.randint(1, 200)]) for _ in range(draws.randint(0, 80))
    ]
    found = split_into_batches(lengths, [(0, 256), (10, 600)], 17)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    for group in found:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or (len(group) * longest <= 256 and len(group) * (longest + 10) <= 600)
        assert len(group) <= 17
    # One more forward would have been cheaper than the padding? Then it was taken.
    assert all(sum(max(lengths[i] for i in g) - lengths[j] for j in g) <= 64 * len(g) for g in found)
