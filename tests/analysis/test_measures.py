from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from phatgoose.analysis import measures
from phatgoose.analysis.measures import (
    agreement_between_layers,
    agreement_within_blocks,
    effective_number,
    entropy,
    expert_shares,
    extremes,
    layer_and_kind,
    load,
    oracle_agreement,
    similarity,
    token_dependence,
)
from phatgoose.errors import EvaluationError, UnknownName
from phatgoose.models.base.module_names import locate_modules
from phatgoose.models.trace.choices import Choices, Tokens
from phatgoose.models.trace.result import Trace

PATHS = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("q_proj", "up_proj")]
NAMES = ("a", "b", "c", "d")


def tokens(n, inputs=None, generated=None):
    inputs = torch.zeros(n, dtype=torch.long) if inputs is None else torch.as_tensor(inputs)
    made = torch.zeros(n, dtype=torch.bool) if generated is None else torch.tensor(generated).bool()
    return Tokens(inputs, torch.arange(n), inputs, torch.arange(n), made, torch.zeros(n))


def choices(path, experts, weights, shared=None, generated=None):
    return Choices(
        path,
        torch.tensor(experts, dtype=torch.int16),
        torch.tensor(weights, dtype=torch.float16),
        tokens(len(experts), generated=generated) if shared is None else shared,
    )


def made(*members, experts=NAMES):
    paths = [c.path for c in members]
    return Trace(
        experts, locate_modules(paths, ["decoder"] * len(paths)), _choices={c.path: [c] for c in members}
    )


@pytest.fixture
def drawn():
    """A trace of 23 tokens of 4 inputs at 6 modules, 2 of 4 experts (or none) on each,
    and w [modules, tokens, experts]."""
    random = np.random.default_rng(0)
    shared = tokens(23, np.sort(random.integers(0, 4, 23)), random.integers(0, 2, 23))
    members, w = [], np.zeros((6, 23, 4))
    for m, path in enumerate(PATHS):
        chosen = np.array([random.permutation(5)[:2] - 1 for _ in range(23)])
        weights = random.dirichlet([1, 1], 23).astype(np.float16)
        for t, j in itertools.product(range(23), range(2)):
            if chosen[t, j] >= 0:
                w[m, t, chosen[t, j]] = weights[t, j]
        members.append(choices(path, chosen.tolist(), weights.tolist(), shared))
    return made(*members), w


def test_load_and_shares(drawn):
    t, w = drawn
    part = t.choices[0].tokens.generated.numpy()
    for wanted, mask in ((None, part >= 0), (True, part), (False, ~part)):
        found = load(t, generated=wanted)
        assert np.allclose([found[p].numpy() for p in PATHS], w[:, mask].mean(1))
        assert np.allclose(list(expert_shares(t, generated=wanted).values()), w[:, mask].mean((0, 1)))
    assert expert_shares(Trace(("a",))) == {"a": 0}
    assert load(Trace(("a",))) == {}


def test_every_decision_counts_alike():
    t = made(
        choices("x", [[0, 1], [1, -1], [1, 0]], [[0.75, 0.25], [0.5, 0.5], [1, 0]]),
        choices("y", [[1, 0]], [[0.5, 0.5]]),
        experts=("a", "b", "c"),
    )
    assert expert_shares(t) == {"a": 1.25 / 4, "b": 2.25 / 4, "c": 0}


@pytest.mark.parametrize("n", [1, 2, 7])
def test_effective_number_of_alike_experts_is_their_number(n):
    assert math.isclose(effective_number([0.1] * n + [0.0] * 3), n)
    assert math.isclose(entropy([0.1] * n), math.log(n), abs_tol=1e-12)
    assert effective_number([]) == effective_number([0, 0]) == entropy([]) == 0


def test_effective_number_is_exp_of_entropy():
    assert math.isclose(effective_number([0.9, 0.1]), 0.9**-0.9 * 0.1**-0.1)
    assert math.isclose(entropy([3, 1]), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def brute_agreement(w, a, b):
    return np.mean([sum(min(w[a, t, e], w[b, t, e]) for e in range(4)) for t in range(w.shape[1])])


def test_agreement_between_layers_and_within_blocks(drawn):
    t, w = drawn
    found = agreement_between_layers(t)
    assert set(found) == {"q_proj", "up_proj"}
    for offset, kind in enumerate(("q_proj", "up_proj")):
        expected = [[brute_agreement(w, 2 * a + offset, 2 * b + offset) for b in range(3)] for a in range(3)]
        assert np.allclose(found[kind], expected)
    assert np.allclose(
        list(agreement_within_blocks(t).values()),
        [brute_agreement(w, 2 * layer, 2 * layer + 1) for layer in range(3)],
    )
    other = choices("z", [[0]], [[1.0]])
    with pytest.raises(EvaluationError, match="didn't read the same tokens"):
        measures.agreement(t.choices[0], other)


def test_token_dependence_splits_the_variance(drawn):
    t, w = drawn
    inputs = t.choices[0].tokens.inputs.numpy()
    for m, path in enumerate(PATHS):
        spread = token_dependence(t)[path]
        within = between = 0.0
        for i in set(inputs):
            mine = w[m, inputs == i]
            within += ((mine - mine.mean(0)) ** 2).sum() / 23
            between += len(mine) * ((mine.mean(0) - w[m].mean(0)) ** 2).sum() / 23
        assert spread.within == pytest.approx(within)
        assert spread.between == pytest.approx(between)
        assert spread.within + spread.between == pytest.approx(w[m].var(0).sum())
    alike = made(choices("x", [[0]] * 3, [[1.0]] * 3, tokens(3, [0, 0, 1])))
    assert token_dependence(alike)["x"].share is None
    by_input = made(choices("x", [[0], [0], [1]], [[1.0]] * 3, tokens(3, [0, 0, 1])))
    assert token_dependence(by_input)["x"].share == 0
    by_token = made(choices("x", [[0], [1], [0], [1]], [[1.0]] * 4, tokens(4, [0, 0, 1, 1])))
    assert token_dependence(by_token)["x"].share == 1


def test_agreement_with_the_oracle(drawn):
    t, w = drawn
    assert np.allclose(list(oracle_agreement(t, "b").values()), w[:, :, 1].mean(1))
    best = {0: "a", 1: "d", 2: "b", 3: "b"}
    inputs = t.choices[0].tokens.inputs.tolist()
    expected = [np.mean([w[m, k, NAMES.index(best[i])] for k, i in enumerate(inputs)]) for m in range(6)]
    assert np.allclose(list(oracle_agreement(t, best).values()), expected)
    for bad in ("z", {0: "z"}):
        with pytest.raises(UnknownName):
            oracle_agreement(t, bad)
    with pytest.raises(EvaluationError, match="input 1"):
        oracle_agreement(t, {0: "a", 2: "a", 3: "a"})


def test_similarity_of_profiles():
    profiles = {"x": {"a": 0.5, "b": 0.3}, "y": {"b": 1.0, "c": 3.0}, "z": {"c": 0.2}, "none": {}}
    found = similarity(profiles)
    xy = math.sqrt(0.375 * 0.25)
    yz = math.sqrt(0.75)
    assert np.allclose(found, [[1, xy, 0, 0], [xy, 1, yz, 0], [0, yz, 1, 0], [0, 0, 0, 0]])
    assert similarity({}).shape == (0, 0)


def test_dead_and_dominating_experts():
    t = made(
        choices("x", [[0, 1]] * 20, [[0.9, 0.1]] * 20),
        choices("y", [[0, 1]] * 19 + [[1, 0]], [[0.75, 0.25]] * 20),
    )
    found = extremes(t)
    assert set(found.dead) == {"c", "d"}
    assert set(found.dominating) == {"a"}
    assert found.dominating["a"] == pytest.approx((0.9 * 20 + 0.75 * 19 + 0.25) / 40, abs=1e-3)
    assert found.captured == (("x", "a", 1.0),)
    alone = made(choices("x", [[0]] * 3, [[1.0]] * 3), experts=("a",))
    assert extremes(alone) == measures.Extremes({}, {}, ())


def test_sums_are_not_single_choices():
    t = Trace(NAMES, sums_only=True)
    for measure in (token_dependence, agreement_between_layers, agreement_within_blocks):
        with pytest.raises(EvaluationError, match="record without histogram"):
            measure(t)
    assert extremes(t).captured == ()


def test_layer_and_kind():
    assert layer_and_kind(
        ["model.layers.12.self_attn.q_proj", "lm_head", "transformer.h.0.mlp.c_fc"][:2]
    ) == [
        (12, "self_attn.q_proj"),
        (None, "lm_head"),
    ]
    both = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.3.layer.1.EncDecAttention.k"]
    assert layer_and_kind(both) == [
        (0, "encoder layer.0.SelfAttention.q"),
        (3, "decoder layer.1.EncDecAttention.k"),
    ]
    assert [p.part for p in locate_modules(both, ["encoder", "encoder"]).values()] == [
        "encoder",
        "cross-attention",
    ]
