"""Bases whose caches can't be shared, or whose rows are easily changed by their company:
scores and answers are those of plain forwards."""

import copy

import pytest
import torch
from accelerate import cpu_offload

from architectures import make
from conftest import make_tokenizer
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.generate import generate, match_exactly
from phatgoose.evaluation.prefill import prefill_prompts
from phatgoose.evaluation.rank import score_choices
from phatgoose.evaluation.rows import MatchRule, OpenRow, Row
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.base.base import Base, decoder_start, device_of
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE
from ranking_fixtures import assert_plain

HYBRID = ["qwen3_5_text", "lfm2", "granitemoehybrid", "minimax", "mamba", "rwkv", "recurrent_gemma"]
SEQ2SEQ = ["bart", "mbart", "pegasus", "marian", "fsmt", "prophetnet", "switch_transformers", "nllb-moe"]
CONFIGS = [EvaluationConfig(), EvaluationConfig(batch_tokens=60, batch_rows=3)]


def rows_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: tuple(torch.randint(3, 320, (n,), generator=generator).tolist())  # noqa: E731
    return [Row(i, ids(n), ((*ids(2), 1), (*ids(5), 1), (1,))) for i, n in enumerate((3, 21, 8, 40, 1, 8))]


def greedy(model, prompt, count):
    """Token by token, each from a plain forward over everything before it."""
    found = []
    for _ in range(count):
        if model.config.is_encoder_decoder:
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([[decoder_start(model), *found]]),
            }
            logits = model(**inputs, use_cache=False).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *found]])).logits
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == 1:
            break
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [*HYBRID, "openai-gpt", *SEQ2SEQ])
def test_scores_equal_one_plain_forward_a_choice(name):
    model, rows = make(name), rows_of()
    for config in CONFIGS:
        assert_plain(model, rows, score_choices(model, rows, 0, config))


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["lfm2", "rwkv", "recurrent_gemma", "bart", "switch_transformers", "prophetnet"]
)
def test_answers_are_those_of_the_row_alone(name):
    model, tokenizer = make(name), make_tokenizer()
    paths = [greedy(model, row.prompt, 5) for row in rows_of()]
    written = [MatchRule(tokenizer, frozenset(), {1}, 5).judge(path, to_the_end=True).text for path in paths]
    # Every other row's target is what it writes.
    rules = [
        MatchRule(tokenizer, frozenset([text if i % 2 else "never"]), {1}, 5)
        for i, text in enumerate(written)
    ]
    rows = [
        OpenRow(r.index, r.prompt, ((*path[:-1], 1),), rule=rule)
        for r, path, rule in zip(rows_of(), paths, rules, strict=True)
    ]
    made = generate(model, rows, 0, EvaluationConfig(), to_the_end=True)
    assert [p.text for p in made] == written
    judged = match_exactly(model, rows, 0, EvaluationConfig())
    assert [p.correct for p in judged] == [p.correct for p in generate(model, rows, 0, EvaluationConfig())]


@torch.no_grad()
def test_a_model_that_looks_ahead_is_refused_and_stays_routed(make_base, make_expert):
    with pytest.raises(EvaluationError, match="isn't causal"):
        score_choices(make("xlnet"), rows_of(), 0, EvaluationConfig())


@torch.no_grad()
def test_the_check_of_a_routed_model_runs_on_the_base_and_traces_nothing(make_base, make_expert, monkeypatch):
    base = make_base("llama")
    monkeypatch.setattr("phatgoose.evaluation.prefill.supports_shared_cache", lambda model: False)
    route(base, Pool([make_expert(base, "one"), make_expert(base, "two", seed=1)]), PHATGOOSE(top_k=1))
    before = routing_of(base)
    with trace(base.model) as found:
        scores = score_choices(base.model, rows_of()[:2], 0, EvaluationConfig())
    assert routing_of(base) is before
    assert {int(p) for c in found.choices for p in c.positions} == set(range(21 + 6))
    assert_plain(base.model, rows_of()[:2], scores)
    unroute(base)


@torch.no_grad()
def test_answers_longer_than_the_rotations_first_range_are_read_anew():
    """Behind 16 positions all of a row's positions turn otherwise: an answer that reaches there can't go on
    from the cache."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    }
    scaling["original_max_position_embeddings"] = 16
    model = make("llama", max_position_embeddings=64, rope_parameters=scaling)
    rows = rows_of()
    assert prefill_prompts(model, [rows[0].prompt], 0, EvaluationConfig()).cache is not None
    long = Row(9, rows[2].prompt, (rows[1].prompt[:12], (4, 1)))
    for batch in ([rows[0], rows[2]], [*rows, long]):
        assert_plain(model, batch, score_choices(model, batch, 0, EvaluationConfig()))


@torch.no_grad()
def test_an_offloaded_base_is_scored_where_it_runs(make_base):
    base = make_base("llama")
    expected = score_choices(base.model, rows_of(), 0, EvaluationConfig())
    model = cpu_offload(copy.deepcopy(base.model), execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert device_of(model).type == Base(model, base.tokenizer, spec="offloaded").device.type == "cpu"
    for found, wanted in zip(score_choices(model, rows_of(), 0, EvaluationConfig()), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
