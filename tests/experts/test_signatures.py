"""Signatures against a full SVD of ΔW in float64."""

from __future__ import annotations

import pytest
import torch

from phatgoose.errors import ExpertError
from phatgoose.experts.weight_signature import signature, why_no_signature
from phatgoose.ops.bottleneck import Bottleneck
from phatgoose.ops.update import Update


def update(d_in=63, d_out=40, rank=5, scale=0.37, seed=0, dtype=torch.float64, **more):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g)
    return Update(a.to(dtype), b.to(dtype), scale, **more)


def full(u):
    """The whole ΔW decomposed, nothing clever."""
    _, values, vectors = torch.linalg.svd(u.scale * (u.B.double() @ u.A.double()), full_matrices=False)
    return values, vectors


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank"), [(63, 40, 5), (17, 100, 16), (100, 17, 16), (9, 7, 30), (5, 5, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("scale", [1 / 16, -2.0])
def test_it_is_the_svd_of_the_whole_matrix(d_in, d_out, rank, scale):
    u = update(d_in, d_out, rank, scale)
    found, (values, vectors) = signature(u), full(u)
    q = min(d_in, d_out, rank)
    assert found.values.shape == (q,)
    torch.testing.assert_close(found.values, values[:q], rtol=1e-10, atol=1e-12)
    signs = (found.vectors * vectors[:q]).sum(1)
    torch.testing.assert_close(signs.abs(), torch.ones(q, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.vectors, signs.sign()[:, None] * vectors[:q], rtol=0, atol=1e-8)
    torch.testing.assert_close(found.arrow, found.vectors[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_in_few_bits_are_decomposed_in_float64(dtype):
    u = update(dtype=dtype)
    found, (values, vectors) = signature(u), full(u)
    torch.testing.assert_close(found.values, values[:5], rtol=1e-10, atol=1e-12)
    assert float((found.arrow @ vectors[0]).abs()) == pytest.approx(1, abs=1e-10)


def test_directions_that_the_matrix_does_not_have_are_left_out():
    u = update(rank=5)
    padded = Update(
        torch.cat([u.A, torch.zeros(3, 63, dtype=torch.float64)]),
        torch.cat([u.B, torch.randn(40, 3, dtype=torch.float64)], dim=1),
        u.scale,
    )
    twice = Update(torch.cat([u.A, u.A]), torch.cat([u.B, u.B], dim=1), u.scale / 2)
    for other in (padded, twice):
        assert len(signature(other).values) == 5
        torch.testing.assert_close(signature(other).values, signature(u).values)


def test_a_matrix_of_zeros_has_none():
    u = update()
    found = signature(Update(u.A, u.B * 0, u.scale))
    assert found.values.shape == (0,)
    assert found.vectors.shape == (0, 63)
    assert not found.arrow.any()


def test_a_bias_changes_nothing():
    torch.testing.assert_close(signature(update(bias=torch.ones(40))).values, signature(update()).values)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rank": 0, "input_scale": torch.ones(63)}, r"\(IA\)³"),
        ({"rank": 0, "output_scale": torch.ones(40)}, r"\(IA\)³"),
        ({"magnitude": torch.ones(40)}, "DoRA"),
        ({"output_scale": torch.ones(40), "covers_bias": False}, "LoRA"),
        ({"rank": 0, "bottleneck": Bottleneck(torch.ones(2, 40), torch.ones(40, 2))}, "bottleneck"),
        ({"embedding": True}, "embedding"),
    ],
)
def test_updates_that_are_no_low_rank_matrix_are_refused(more, said):
    u = update(**more)
    assert why_no_signature(u)
    with pytest.raises(ExpertError, match=f"no signature in the weights of this update: .*{said}"):
        signature(u)


def test_a_dora_whose_weight_was_put_in_is_still_named():
    """It was said to be LoRA, "and only LoRA's update is a low-rank matrix"."""
    dora = update(magnitude=torch.rand(40) + 0.5).resolved(torch.randn(40, 63))
    assert dora.kind == "DoRA"
    assert "it is DoRA" in why_no_signature(dora)
