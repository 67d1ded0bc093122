"""Scores of inputs split over ranks, against the reference on the whole input."""

from __future__ import annotations

import pytest
import torch

from phatgoose.ops.reference import gate_scores, standardise
from phatgoose.ops.sharded import partial_scores, scores


def sharded(u, gates, ranks):
    width = u.shape[-1] // ranks
    parts = [slice(r * width, (r + 1) * width) for r in range(ranks)]
    total = sum(partial_scores(u[:, p], gates[:, p], r, ranks) for r, p in enumerate(parts))
    sums = torch.stack([gates[:, p].double().sum(-1) for p in parts]).float()
    return scores(total, sums, u.shape[-1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_scores_of_parts_are_the_scores_of_the_whole(ranks, dtype, tokens):
    g = torch.Generator().manual_seed(ranks)
    u = (torch.randn(tokens, 60, generator=g) * 3 + 1).to(dtype)
    u[:, 15:30] += 7  # so that ranks' means differ
    gates = standardise(torch.randn(5, 60, generator=g))
    torch.testing.assert_close(sharded(u, gates, ranks), gate_scores(u, gates), rtol=1e-5, atol=1e-6)


def test_a_large_mean_costs_no_digits():
    g = torch.Generator().manual_seed(0)
    u = torch.randn(9, 64, generator=g) + 300  # where Σu² − d·mean² would keep three digits
    gates = standardise(torch.randn(4, 64, generator=g, dtype=torch.float64))
    expected = gate_scores(u.double(), gates)
    torch.testing.assert_close(sharded(u, gates.float(), 2).double(), expected, rtol=1e-4, atol=1e-5)
