"""Every backend against the reference, and the reference against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from phatgoose.errors import UnknownName
from phatgoose.ops import BACKENDS, backend, fast, make_stack, reference

OTHERS = [name for name in BACKENDS if name != "reference"]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def problem(tokens, ranks, d_in=48, d_out=40, dtype=torch.float32, k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    parts = [
        (
            torch.randn(r, d_in, generator=g),
            torch.randn(d_out, r, generator=g),
            float(torch.rand(1, generator=g)) + 0.5,
        )
        for r in ranks
    ]
    u = torch.randn(tokens, d_in, generator=g) * 3 + 1
    y = torch.randn(tokens, d_out, generator=g)
    gates = reference.standardise(torch.randn(len(ranks), d_in, generator=g))
    return parts, u.to(dtype), y.to(dtype), make_stack(parts, d_in, d_out, dtype), gates


SHAPES = [
    (0, (4, 4)), (1, (4,)), (1, (16,) * 100), (3, (3, 0, 5)), (7, (16,) * 80), (8, (1,) * 5), (63, (2, 9, 4, 1)), (100, (16,) * 90),
    (100, tuple(range(1, 60))), (5, (0, 0)), (2, (0,)),
]  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "ranks"), SHAPES)
def test_mix_equals_the_sum_in_float64(name, dtype, tokens, ranks):
    parts, u, y, stack, gates = problem(tokens, ranks, dtype=dtype)
    ops = backend(name)
    chosen, weights = ops.choose(ops.gate_scores(u, gates), 2)
    assert chosen.shape == weights.shape == (tokens, min(2, len(ranks)))
    expected = y.double().clone()
    for n in range(tokens):
        for e, w in zip(chosen[n].tolist(), weights[n].double(), strict=True):
            a, b, s = parts[e]
            if dtype == torch.bfloat16:  # what is stored is rounded
                a, b, s = a.to(dtype), (b * s).to(dtype), 1.0
            expected[n] += w * s * (b.double() @ (a.double() @ u[n].double()))
    found = ops.mix(u, y, stack, chosen, weights)
    assert found.dtype == y.dtype
    assert found.shape == y.shape
    assert relative(found, expected) < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("way", [fast._dense, fast._gather, fast._grouped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_ways_agree_with_the_reference(way, dtype):
    _, u, y, stack, gates = problem(17, (6,) * 7, dtype=dtype)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 3)
    chosen[4, 1] = -1  # nothing chosen there
    expected = reference.mix(u, y, stack, chosen, weights)
    assert relative(way(u, y, stack, chosen, weights), expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_chosen_changes_nothing(name):
    _, u, y, stack, _ = problem(5, (3, 4))
    ops = backend(name)
    none = torch.full((5, 2), -1)
    assert torch.equal(ops.mix(u, y, stack, none, torch.ones(5, 2)), y)
    empty = torch.zeros(5, 0, dtype=torch.long)
    assert torch.equal(ops.mix(u, y, stack, empty, torch.zeros(5, 0)), y)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_expert_chosen_twice_acts_with_the_sum_of_its_weights(name):
    _, u, y, stack, _ = problem(4, (3, 4))
    ops = backend(name)
    twice = ops.mix(u, y, stack, torch.ones(4, 2, dtype=torch.long), torch.full((4, 2), 0.25))
    once = reference.mix(u, y, stack, torch.ones(4, 1, dtype=torch.long), torch.full((4, 1), 0.5))
    assert relative(twice, once) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [5, 64, 577])
def test_scores_equal_the_formula_in_float64(name, dtype, d):
    g = torch.Generator().manual_seed(1)
    u = (torch.randn(9, d, generator=g) * 2 + 5).to(dtype)  # a mean far from zero
    raw = torch.randn(6, d, generator=g) + 1
    gates = reference.standardise(raw.double()).float()
    x, v = u.double(), raw.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = x @ v.T / math.sqrt(d)
    found = backend(name).gate_scores(u, gates)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_choose_is_softmax_over_all_then_top_k_then_renormalised(name, k):
    scores = torch.randn(31, 5, generator=torch.Generator().manual_seed(2))
    chosen, weights = backend(name).choose(scores, k)
    values, order = scores.softmax(-1).sort(-1, descending=True)
    expected = values[:, :k] / values[:, :k].sum(-1, keepdim=True)
    assert torch.equal(chosen, order[:, :k])
    assert torch.allclose(weights, expected, atol=1e-6)


def test_reference_breaks_ties_by_order():
    chosen, weights = reference.choose(torch.zeros(2, 4), 2)
    assert chosen.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_reach_the_input_and_equal_the_references(name):
    _, u, y, stack, gates = problem(6, (3, 2, 4))
    found = []
    for ops in (backend("reference"), backend(name)):
        x = u.clone().requires_grad_()
        chosen, weights = ops.choose(ops.gate_scores(x, gates), 2)
        ops.mix(x, y, stack, chosen, weights).square().sum().backward()
        found.append(x.grad)
    assert relative(found[1], found[0]) < 1e-5


def test_names():
    assert backend("auto").name == "torch"
    with pytest.raises(UnknownName, match="did you mean 'torch'"):
        backend("troch")
